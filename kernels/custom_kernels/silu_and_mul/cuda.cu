// SPDX-License-Identifier: Apache-2.0
//
// y = silu(gate) · up.
//
//   x [M, 2K] float32, float16 or bfloat16, unit inner stride, any row stride: gate is its first
//   half, up its second; y [M, K] of x's dtype. In float32:
//   y = round(round(gate / (1 + exp(-gate))) · up).
//
// The work is memory traffic: both halves in, y out, each once, in vectors of 16 bytes. A thread
// has up to kEach vectors of both halves, all in flight; a block has a part of a row, or several
// short rows.
//
// The launch overlaps the kernel before it and the one after it.

#include <cuda_runtime.h>

#include <cstdint>

#define KERNEL "silu_and_mul.cuda"
#include "include/device.cuh"
#include "include/vectors.cuh"

namespace {

using namespace custom_kernels;

constexpr int kEach = 2;
constexpr int kThreads = 256;

struct Arguments {
  const void* x;
  void* y;
  int64_t rows, stride;  // of x, in elements
  int k;
  int parts;  // of a row
  int part;   // vectors of a part
};

// With the sum divided by 16, its inverse is no subnormal number, which would become zero.
template <typename T>
__device__ float silu(float gate) {
  const float power = sizeof(T) == 4 ? expf(-gate) : __expf(-gate);
  const float sum = __fmaf_rn(power, 0x1p-4f, 0x1p-4f);
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(sum));
  return gate * 0x1p-4f * inverse;
}

template <typename T, int W>
__global__ void __launch_bounds__(kThreads) silu_rows(const __grid_constant__ Arguments a) {
  using V = Vector<T, W>;
  const int part = static_cast<int>(blockIdx.x % a.parts);
  const int64_t row = int64_t{blockIdx.x / a.parts} * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  const T *gate = static_cast<const T*>(a.x) + row * a.stride, *up = gate + a.k;
  T* y = static_cast<T*>(a.y) + row * a.k;
  const int end = min((part + 1) * a.part, a.k / W);
  take_turn();
  V gates[kEach], ups[kEach];
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    const int i = part * a.part + threadIdx.x + n * blockDim.x;
    if (i < end) gates[n] = V::load(gate, i), ups[n] = V::load(up, i);
  }
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    const int i = part * a.part + threadIdx.x + n * blockDim.x;
    if (i < end) {
      float values[W], factors[W];
      gates[n].unpack(values);
#pragma unroll
      for (int j = 0; j < W; ++j) values[j] = silu<T>(values[j]);
      V::pack(values).unpack(values);
      ups[n].unpack(factors);
#pragma unroll
      for (int j = 0; j < W; ++j) values[j] *= factors[j];
      V::pack(values).store(y, i);
    }
  }
}

void launch_silu(Arguments& a, DLDataType dtype, bool wide, int device, cudaStream_t stream) {
  with_vectors(dtype, wide, [&](auto* type, auto w) {
    const int vectors = a.k / w;
    // Few vectors: one for each thread, on many multiprocessors. Many: more loads in flight.
    const bool few =
        a.rows * vectors <= int64_t{2} * kThreads * Device::get(device).multiprocessors;
    const int each = few ? 1 : kEach, most = few ? kThreads / 2 : kThreads;
    a.parts = (vectors + each * most - 1) / (each * most);
    int threads = ((vectors + a.parts - 1) / a.parts + each - 1) / each;
    threads = (threads + 31) / 32 * 32;
    int rows = 1;
    if (vectors < 32) {  // lanes of a warp
      for (threads = 1; threads < vectors; threads *= 2) {
      }
      rows = kThreads / threads;
    }
    a.part = each * threads;
    launch(silu_rows<std::remove_pointer_t<decltype(type)>, w()>, device, stream,
           (a.rows + rows - 1) / rows * a.parts, dim3(threads, rows), 0, a);
  });
}

}  // namespace

#ifndef __CUDA_ARCH__
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

namespace {

using tvm::ffi::TensorView;

void silu_and_mul(TensorView x, TensorView y) {
  const int device = x.device().device_id;
  DeviceGuard on(device);
  const DLDataType dtype = x.dtype();
  const int64_t bytes = dtype.bits / 8, k = y.size(1);
  if (k > INT32_MAX / 4)
    TVM_FFI_THROW(ValueError) << KERNEL ": a row of " << 2 * k << " values is too long";
  Arguments a{};
  a.x = x.data_ptr(), a.y = y.data_ptr();
  a.rows = x.size(0);
  a.stride = a.rows > 1 ? x.stride(0) : 2 * k;  // of one row it means nothing
  a.k = static_cast<int>(k);
  const bool wide = k * bytes % 16 == 0 && aligned(a.x, a.stride * bytes) && aligned(a.y, 0);
  launch_silu(a, dtype, wide, device, current_stream(device));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_and_mul, silu_and_mul);
#endif
