// SPDX-License-Identifier: Apache-2.0
//
// Rotary embedding of queries and keys.
//
//   query [M, heads · D] and key, which may be none, float32, float16 or bfloat16, unit inner
//   stride, any row stride; positions [M] int64; cache [P, R] of that dtype or float32, R/2 cosines
//   and R/2 sines; outputs contiguous. Pair i of a head, of the values i and R/2 + i (neox) or 2i
//   and 2i + 1, becomes (a · cos - b · sin, b · cos + a · sin), in float32, rounded once; the
//   values from R on are copied.
//
// The work is memory traffic: query and key in and out, each once, in vectors of 16 bytes. A block
// has a token. A thread has a vector of pairs: its angles, loaded once, and the two vectors of x of
// one head after the other, of kEach heads at a time. Both kinds of pairs take the same two
// vectors.
//
// The launch overlaps the kernel before it and the one after it.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#define KERNEL "rotary_embedding.cuda"
#include "include/device.cuh"
#include "include/vectors.cuh"

namespace {

using namespace custom_kernels;

constexpr int kEach = 2;
constexpr int kThreads = 256;

struct Arguments {
  const void *query, *key;
  const int64_t* positions;
  const void* cache;
  void *rotated, *rotated_key;
  int64_t rows, query_stride, key_stride;  // strides in elements
  int heads, kv_heads, head_size, half;
  bool is_neox;
  bool wide_cache;  // float32, and query is not
};

template <int W>
__device__ void rotate(float (&a)[W], float (&b)[W], const float (&cos)[W], const float (&sin)[W]) {
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const float old = a[i];
    a[i] = old * cos[i] - b[i] * sin[i];
    b[i] = b[i] * cos[i] + old * sin[i];
  }
}

// From two vectors in which neighbours are pairs to the first and the second ones, and back.
template <int W>
__device__ void part(float (&a)[W], float (&b)[W]) {
  float both[2 * W];
#pragma unroll
  for (int i = 0; i < W; ++i) both[i] = a[i], both[W + i] = b[i];
#pragma unroll
  for (int i = 0; i < W; ++i) a[i] = both[2 * i], b[i] = both[2 * i + 1];
}
template <int W>
__device__ void join(float (&a)[W], float (&b)[W]) {
  float both[2 * W];
#pragma unroll
  for (int i = 0; i < W; ++i) both[2 * i] = a[i], both[2 * i + 1] = b[i];
#pragma unroll
  for (int i = 0; i < W; ++i) a[i] = both[i], b[i] = both[W + i];
}

template <typename T, int W>
__global__ void __launch_bounds__(kThreads) rotate_rows(const __grid_constant__ Arguments a) {
  using V = Vector<T, W>;
  const int64_t row = blockIdx.x;
  const T* query = static_cast<const T*>(a.query) + row * a.query_stride;
  const T* key = static_cast<const T*>(a.key) + row * a.key_stride;
  T* rotated = static_cast<T*>(a.rotated) + row * a.heads * a.head_size;
  T* rotated_key = static_cast<T*>(a.rotated_key) + row * a.kv_heads * a.head_size;
  const int all = a.heads + a.kv_heads;
  auto from = [&](int head) {
    return head < a.heads ? query + head * a.head_size : key + (head - a.heads) * a.head_size;
  };
  auto to = [&](int head) {
    return head < a.heads ? rotated + head * a.head_size
                          : rotated_key + (head - a.heads) * a.head_size;
  };
  const int vectors = a.half / W, step = kEach * blockDim.y;
  take_turn();
  const int64_t position = a.positions[row];
#pragma unroll 1
  for (int j = threadIdx.x; j < vectors; j += blockDim.x) {
    const int first = a.is_neox ? j : 2 * j, second = a.is_neox ? vectors + j : 2 * j + 1;
    V of_a[kEach], of_b[kEach];
    auto load = [&](int start) {
#pragma unroll
      for (int n = 0; n < kEach; ++n) {
        const int head = start + n * blockDim.y;
        if (head < all) of_a[n] = V::load(from(head), first), of_b[n] = V::load(from(head), second);
      }
    };
    load(threadIdx.y);  // before the angles, which wait for the position
    float cos[W], sin[W];
    if (a.wide_cache) {
      const float* angles = static_cast<const float*>(a.cache) + position * 2 * a.half;
      load_floats(angles, j, cos);
      load_floats(angles, vectors + j, sin);
    } else {
      const T* angles = static_cast<const T*>(a.cache) + position * 2 * a.half;
      V::load_shared(angles, j).unpack(cos);
      V::load_shared(angles, vectors + j).unpack(sin);
    }
#pragma unroll 1
    for (int start = threadIdx.y; start < all; start += step) {
      if (start != threadIdx.y) load(start);
#pragma unroll
      for (int n = 0; n < kEach; ++n) {
        const int head = start + n * blockDim.y;
        if (head < all) {
          float x[W], y[W];
          of_a[n].unpack(x), of_b[n].unpack(y);
          if (!a.is_neox) part(x, y);
          rotate(x, y, cos, sin);
          if (!a.is_neox) join(x, y);
          V::pack(x).store(to(head), first), V::pack(y).store(to(head), second);
        }
      }
    }
  }
#pragma unroll 1
  for (int j = 2 * vectors + threadIdx.x; j < a.head_size / W; j += blockDim.x)
#pragma unroll 1
    for (int head = threadIdx.y; head < all; head += blockDim.y)
      V::load(from(head), j).store(to(head), j);
}

void launch_rotation(const Arguments& a, DLDataType dtype, bool wide, int device,
                     cudaStream_t stream) {
  with_vectors(dtype, wide, [&](auto* type, auto w) {
    // Few tokens: a head for each thread. Many: more loads in flight.
    const int each = a.rows <= Device::get(device).multiprocessors ? 1 : kEach;
    const int lanes = std::min<int>(a.half / w, 32), heads = a.heads + a.kv_heads;
    const int teams = std::min((heads + each - 1) / each, kThreads / lanes);
    launch(rotate_rows<std::remove_pointer_t<decltype(type)>, w()>, device, stream, a.rows,
           dim3(lanes, teams), 0, a);
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

void rotary_embedding(TensorView query, Optional<TensorView> key, TensorView positions,
                      TensorView cache, int64_t head_size, bool is_neox, TensorView rotated,
                      TensorView rotated_key) {
  const int device = query.device().device_id;
  DeviceGuard on(device);
  const DLDataType dtype = query.dtype();
  const int64_t bytes = dtype.bits / 8, rotary = cache.size(1);
  if (query.size(1) > INT32_MAX || (key.has_value() && key.value().size(1) > INT32_MAX))
    TVM_FFI_THROW(ValueError) << KERNEL ": a row of more than 2^31 values is too long";
  Arguments a{};
  a.query = query.data_ptr(), a.rotated = rotated.data_ptr();
  a.positions = static_cast<const int64_t*>(positions.data_ptr());
  a.cache = cache.data_ptr();
  a.rows = query.size(0);
  a.query_stride = a.rows > 1 ? query.stride(0) : query.size(1);  // of one row it means nothing
  a.head_size = static_cast<int>(head_size);
  a.heads = static_cast<int>(query.size(1) / head_size);
  a.half = static_cast<int>(rotary / 2);
  a.is_neox = is_neox;
  a.wide_cache = cache.dtype().bits > dtype.bits;
  bool wide = head_size * bytes % 16 == 0 && a.half * bytes % 16 == 0 && aligned(a.cache, 0) &&
              aligned(a.query, a.query_stride * bytes) && aligned(a.rotated, 0);
  if (key.has_value()) {
    const TensorView& k = key.value();
    a.key = k.data_ptr(), a.rotated_key = rotated_key.data_ptr();
    a.key_stride = a.rows > 1 ? k.stride(0) : k.size(1);
    a.kv_heads = static_cast<int>(k.size(1) / head_size);
    wide = wide && aligned(a.key, a.key_stride * bytes) && aligned(a.rotated_key, 0);
  }
  launch_rotation(a, dtype, wide, device, current_stream(device));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rotary_embedding, rotary_embedding);
#endif
