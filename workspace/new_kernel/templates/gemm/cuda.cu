// SPDX-License-Identifier: Apache-2.0
// y = x · Wᵀ + b on tensor cores through WMMA: a block per 32 x 32 tile of y, a warp per 16 x 16.
//
// x [M, K], W [N, K], b [N] or none, y [M, N], all bfloat16 or all float16; sums in float32.
//
// dtypes: bfloat16 float16
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

constexpr int kTile = 32, kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    tiles(const T* x, const T* w, const T* bias, T* y, int64_t m, int64_t n, int64_t k,
          int64_t x_stride, int64_t w_stride) {
  using namespace nvcuda;
  __shared__ alignas(32) T x_tile[kTile][kTile + 8], w_tile[kTile][kTile + 8];
  __shared__ alignas(32) float sums[kTile][kTile + 4];
  int64_t row = int64_t{blockIdx.y} * kTile, column = int64_t{blockIdx.x} * kTile;
  int warp = threadIdx.x / 32, warp_row = warp / 2 * 16, warp_column = warp % 2 * 16;

  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
  wmma::fill_fragment(sum, 0.f);
  for (int64_t start = 0; start < k; start += kTile) {
    // Zeros beyond the edges: they add nothing. Unrolled further, it runs out of registers.
#pragma unroll 2
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      int64_t r = i / kTile, c = i % kTile;
      bool inside = start + c < k;
      x_tile[r][c] = inside && row + r < m ? x[(row + r) * x_stride + start + c] : T(0.f);
      w_tile[r][c] = inside && column + r < n ? w[(column + r) * w_stride + start + c] : T(0.f);
    }
    __syncthreads();
    for (int step = 0; step < kTile; step += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> a;
      wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> b;
      wmma::load_matrix_sync(a, &x_tile[warp_row][step], kTile + 8);
      wmma::load_matrix_sync(b, &w_tile[warp_column][step], kTile + 8);
      wmma::mma_sync(sum, a, b, sum);
    }
    __syncthreads();
  }
  wmma::store_matrix_sync(&sums[warp_row][warp_column], sum, kTile + 4, wmma::mem_row_major);
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    int64_t r = row + i / kTile, c = column + i % kTile;
    if (r < m && c < n)
      y[r * n + c] = T(sums[i / kTile][i % kTile] + (bias ? float(bias[c]) : 0.f));
  }
}

template <typename T>
void launch(TensorView x, TensorView w, Optional<TensorView> bias, TensorView y) {
  auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, x.device().device_id));
  auto data = [](TensorView tensor) { return static_cast<T*>(tensor.data_ptr()); };
  int64_t m = x.size(0), n = w.size(0);
  dim3 grid(static_cast<unsigned>((n + kTile - 1) / kTile),
            static_cast<unsigned>((m + kTile - 1) / kTile));
  tiles<T><<<grid, kThreads, 0, stream>>>(data(x), data(w),
                                          bias.has_value() ? data(bias.value()) : nullptr, data(y),
                                          m, n, x.size(1), x.stride(0), w.stride(0));
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    TVM_FFI_THROW(RuntimeError) << cudaGetErrorString(error);
}

static void gemm(TensorView x, TensorView w, Optional<TensorView> bias, TensorView y) {
  if (x.dtype().code == kDLBfloat)
    launch<__nv_bfloat16>(x, w, bias, y);
  else
    launch<__half>(x, w, bias, y);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm, gemm);
