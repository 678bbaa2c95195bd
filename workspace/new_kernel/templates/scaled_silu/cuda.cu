// SPDX-License-Identifier: Apache-2.0
// y = silu(x) * scale: a block per row.
//
// x [M, K], scale [K], y [M, K], all bfloat16 or all float16; computed in float32.
//
// dtypes: bfloat16 float16
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

using tvm::ffi::TensorView;

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) rows(const T* x, const T* scale, T* y, int64_t k) {
  int64_t row = blockIdx.x * k;  // 64 bits: M times K may be large
  for (int64_t i = threadIdx.x; i < k; i += kThreads) {
    float value = float(x[row + i]);
    y[row + i] = T(value / (1.f + __expf(-value)) * float(scale[i]));
  }
}

template <typename T>
void launch(TensorView x, TensorView scale, TensorView y) {
  auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, x.device().device_id));
  rows<<<static_cast<unsigned>(x.size(0)), kThreads, 0, stream>>>(
      static_cast<const T*>(x.data_ptr()), static_cast<const T*>(scale.data_ptr()),
      static_cast<T*>(y.data_ptr()), x.size(1));
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    TVM_FFI_THROW(RuntimeError) << cudaGetErrorString(error);
}

static void scaled_silu(TensorView x, TensorView scale, TensorView y) {
  if (x.dtype().code == kDLBfloat)
    launch<__nv_bfloat16>(x, scale, y);
  else
    launch<__half>(x, scale, y);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(scaled_silu, scaled_silu);
