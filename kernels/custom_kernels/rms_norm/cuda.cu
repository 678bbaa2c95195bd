// SPDX-License-Identifier: Apache-2.0
//
// y, total = RMS norm of x + residual, and the sum.
//
//   x, residual [M, K] float32, float16 or bfloat16, unit inner stride, any row stride, residual or
//   none; weight [K] of that dtype or float32, or none; y, total [M, K] of x's dtype. Per row, in
//   float32: v = x + residual, total = round(v), r = 1 / sqrt(mean(v²) + epsilon),
//   y = round(round(v · r) · weight), the inner one to the weight's dtype.
//
// The work is memory traffic: x and residual in, total and y out. Every value is loaded once, in
// vectors of 16 bytes, and stays in registers: a thread has up to kKept vectors of a row, several
// of them in flight; of longer rows the rest is read twice. A row has a block; a short one a part
// of a warp, so that a block has several. Squares are added in an order that depends on shape and
// device only.
//
// The launch overlaps the kernel before it and the one after it; the weight is fetched into L2
// meanwhile.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#define KERNEL "rms_norm.cuda"
#include "include/device.cuh"
#include "include/vectors.cuh"

namespace {

using namespace custom_kernels;

constexpr int kKept = 2;  // vectors of a thread that stay in registers
constexpr int kThreads = 1024;
constexpr int kSmallBlock = 128;  // threads of a block with several rows

struct Arguments {
  const void *x, *residual, *weight;
  void *y, *total;
  int64_t rows, x_stride, residual_stride;  // strides in elements
  int k;
  float inverse_k, epsilon;
  bool wide_weight;  // float32, and x is not
};

// Of the threads of a row: a power of two of lanes, or the block.
__device__ float sum_of_row(float value) {
  __shared__ float partial[kThreads / 32];
  for (int other = min(blockDim.x, 32) / 2; other > 0; other /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, other);
  if (blockDim.x > 32) {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (lane == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = lane < warps ? partial[lane] : 0.f;
    for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffffu, value, other);
  }
  return value;
}

template <typename T, int W>
__global__ void __launch_bounds__(kThreads) norm_rows(const __grid_constant__ Arguments a) {
  using V = Vector<T, W>;
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  // Threads of a row behind the end stay for the sums.
  const int vectors = row < a.rows ? a.k / W : 0;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
  T* total = static_cast<T*>(a.total) + row * a.k;
  T* y = static_cast<T*>(a.y) + row * a.k;
  const int thread = threadIdx.x, threads = blockDim.x;
  if (a.weight) {
    const int bytes = (a.wide_weight ? 4 : sizeof(T)) * W;
    for (int i = thread; i < vectors; i += threads)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(a.weight) +
                                                    int64_t{i} * bytes));
  }
  take_turn();

  float squares = 0.f;
  // Adds the residual, and writes the sum.
  auto summed = [&](V of_x, V of_residual, int i, float (&v)[W]) {
    of_x.unpack(v);
    if (a.residual) {
      float more[W];
      of_residual.unpack(more);
#pragma unroll
      for (int j = 0; j < W; ++j) v[j] += more[j];
      V::pack(v).store(total, i);
    }
  };
  const bool narrow_weight = a.weight && !a.wide_weight;
  auto load_weight = [&](int i) { return V::load_shared(static_cast<const T*>(a.weight), i); };
  auto normalized = [&](const float (&v)[W], float factor, V of_weight, int i) {
    float of_y[W];
#pragma unroll
    for (int j = 0; j < W; ++j) of_y[j] = v[j] * factor;
    if (a.weight) {
      float weight[W];
      if (a.wide_weight) {
        load_floats(static_cast<const float*>(a.weight), i, weight);
      } else {
        of_weight.unpack(weight);
        V::pack(of_y).unpack(of_y);
      }
#pragma unroll
      for (int j = 0; j < W; ++j) of_y[j] *= weight[j];
    }
    V::pack(of_y).store(y, i);
  };
  auto add_squares = [&](const float (&v)[W]) {
#pragma unroll
    for (int j = 0; j < W; ++j) squares = fmaf(v[j], v[j], squares);
  };

  V of_x[kKept], of_residual[kKept];
#pragma unroll
  for (int n = 0; n < kKept; ++n) {
    const int i = thread + n * threads;
    if (i < vectors) {
      of_x[n] = V::load(x, i);
      if (a.residual) of_residual[n] = V::load(residual, i);
    }
  }
  float v[kKept][W];
#pragma unroll
  for (int n = 0; n < kKept; ++n) {
    const int i = thread + n * threads;
    if (i < vectors) {
      summed(of_x[n], of_residual[n], i, v[n]);
      add_squares(v[n]);
    }
  }
  V of_weight[kKept];
#pragma unroll
  for (int n = 0; n < kKept; ++n) {
    const int i = thread + n * threads;
    if (narrow_weight && i < vectors) of_weight[n] = load_weight(i);
  }
#pragma unroll 1
  for (int i = thread + kKept * threads; i < vectors; i += threads) {
    float more[W];
    summed(V::load(x, i), a.residual ? V::load(residual, i) : V{}, i, more);
    add_squares(more);
  }
  const float factor = rsqrtf(fmaf(sum_of_row(squares), a.inverse_k, a.epsilon));
#pragma unroll
  for (int n = 0; n < kKept; ++n) {
    const int i = thread + n * threads;
    if (i < vectors) normalized(v[n], factor, of_weight[n], i);
  }
#pragma unroll 1
  for (int i = thread + kKept * threads; i < vectors; i += threads) {
    float more[W];
    summed(V::load(x, i), a.residual ? V::load(residual, i) : V{}, i, more);
    normalized(more, factor, narrow_weight ? load_weight(i) : V{}, i);
  }
}

void launch_norm(const Arguments& a, DLDataType dtype, bool wide, int device, cudaStream_t stream) {
  with_vectors(dtype, wide, [&](auto* type, auto w) {
    const int vectors = a.k / w;
    // Few rows: a vector for each thread. Many: small blocks, and more loads in flight.
    const int each = a.rows <= Device::get(device).multiprocessors ? 1 : kKept;
    int threads = 1;
    while (threads < std::min(vectors, 32)) threads *= 2;
    threads = std::max(threads, std::min((vectors + each - 1) / each, kThreads));
    if (threads > 32) threads = (threads + 31) / 32 * 32;
    const int rows = std::max(1, kSmallBlock / threads * (threads <= 32));
    launch(norm_rows<std::remove_pointer_t<decltype(type)>, w()>, device, stream,
           (a.rows + rows - 1) / rows, dim3(threads, rows), 0, a);
  });
}

}  // namespace

#ifndef __CUDA_ARCH__
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

namespace {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

void rms_norm(TensorView x, Optional<TensorView> residual, Optional<TensorView> weight,
              double epsilon, TensorView y, TensorView total) {
  const int device = x.device().device_id;
  DeviceGuard on(device);
  const DLDataType dtype = x.dtype();
  const int64_t bytes = dtype.bits / 8;
  Arguments a{};
  a.x = x.data_ptr(), a.y = y.data_ptr();
  a.rows = x.size(0);
  if (x.size(1) > INT32_MAX / 2)
    TVM_FFI_THROW(ValueError) << KERNEL ": a row of " << x.size(1) << " values is too long";
  a.k = static_cast<int>(x.size(1));
  a.x_stride = a.rows > 1 ? x.stride(0) : a.k;  // of one row it means nothing
  a.inverse_k = 1.f / static_cast<float>(a.k);
  a.epsilon = static_cast<float>(epsilon);
  bool wide = a.k * bytes % 16 == 0 && aligned(a.x, a.x_stride * bytes) && aligned(a.y, 0);
  if (residual.has_value()) {
    a.residual = residual.value().data_ptr(), a.total = total.data_ptr();
    a.residual_stride = a.rows > 1 ? residual.value().stride(0) : a.k;
    wide = wide && aligned(a.residual, a.residual_stride * bytes) && aligned(a.total, 0);
  }
  if (weight.has_value()) {
    a.weight = weight.value().data_ptr();
    a.wide_weight = weight.value().dtype().bits > dtype.bits;
    wide = wide && aligned(a.weight, 0);
  }
  launch_norm(a, dtype, wide, device, current_stream(device));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm, rms_norm);
#endif
