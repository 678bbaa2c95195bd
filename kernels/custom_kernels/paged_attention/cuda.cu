// SPDX-License-Identifier: Apache-2.0
//
// Attention of one query per sequence to a paged cache: y = sum over t of
// softmax(scale · q · k[t]) · v[t].
//
//   query [B, Hq, D], key_pages and value_pages [P, page, Hkv, D] float32, float16 or bfloat16,
//   unit inner stride, D up to 256 (more where rows are aligned to 16 bytes); block_table [B, W]
//   and lengths [B] int32; y [B, Hq, D] of query's dtype. In float32, rounded once.
//
// The work is memory traffic: keys and values in, each once for up to 4 of the query heads that
// share them (with 8, registers leave room for one block in a multiprocessor). A block has these
// heads of a sequence. A team of lanes reads a key, a vector each, adds up its products by
// shuffles, and keeps a softmax of its own over every so many tokens: the running maximum, the sum
// of powers below it, the weighted sum of values (Milakov and Gimelshein, Online normalizer
// calculation for softmax, 2018). At the end the block adds its teams' results.
//
// A sequence is not split: a few long ones leave most of a GPU idle. paged_attention.triton splits.
//
// The launch overlaps the kernel before it and the one after it.

#include <cuda_runtime.h>

#include <cstdint>

#define KERNEL "paged_attention.cuda"
#include "include/device.cuh"
#include "include/vectors.cuh"

namespace {

using namespace custom_kernels;

constexpr int kThreads = 256;
constexpr int kMostHeads = 4;
constexpr int kMostEach = 8;  // vectors of a lane

struct Strides {
  int64_t page, token, head;  // in elements
};

struct Arguments {
  const void *query, *keys, *values;
  const int *table, *lengths;
  void* y;
  Strides key, value;
  int64_t query_stride, head_stride, table_stride;
  int page, kv_heads, group, d;
  int chunks;   // of the query heads that share a key head
  int lanes;    // of a team, a power of two
  float scale;  // of powers of two
};

// Each lane of a team has Each vectors of W values, of Heads query heads.
template <typename T, int W, int Heads, int Each>
__global__ void __launch_bounds__(kThreads) attend(const __grid_constant__ Arguments a) {
  using V = Vector<T, W>;
  extern __shared__ float shared[];  // [teams] maxima, [teams] sums, [teams][d] weighted values
  const int teams = kThreads / a.lanes, team = threadIdx.x / a.lanes, lane = threadIdx.x % a.lanes;
  const int chunk = blockIdx.x % a.chunks, kv_head = blockIdx.x / a.chunks % a.kv_heads;
  const int64_t sequence = blockIdx.x / a.chunks / a.kv_heads;
  const int first = kv_head * a.group + chunk * Heads;
  const int heads = min(Heads, a.group - chunk * Heads), vectors = a.d / W;
  take_turn();
  const int length = a.lengths[sequence];

  float query[Heads][Each][W], weighted[Heads][Each][W], maximum[Heads], total[Heads];
#pragma unroll
  for (int h = 0; h < Heads; ++h) {
    maximum[h] = -INFINITY, total[h] = 0.f;
    const T* row = static_cast<const T*>(a.query) + sequence * a.query_stride +
                   (first + min(h, heads - 1)) * a.head_stride;
#pragma unroll
    for (int n = 0; n < Each; ++n) {
      const int j = lane + n * a.lanes;
#pragma unroll
      for (int i = 0; i < W; ++i) query[h][n][i] = weighted[h][n][i] = 0.f;
      if (j < vectors) V::load_shared(row, j).unpack(query[h][n]);
    }
  }

#pragma unroll 1
  for (int start = 0; start < length; start += teams) {  // the same for all lanes of a warp
    const int token = start + team;
    const bool held = token < length;
    const int64_t page = held ? a.table[sequence * a.table_stride + token / a.page] : 0;
    const T* key = static_cast<const T*>(a.keys) + page * a.key.page +
                   token % a.page * a.key.token + kv_head * a.key.head;
    const T* value = static_cast<const T*>(a.values) + page * a.value.page +
                     token % a.page * a.value.token + kv_head * a.value.head;
    V keys[Each], values[Each];
#pragma unroll
    for (int n = 0; n < Each; ++n) {
      const int j = lane + n * a.lanes;
      if (held && j < vectors) keys[n] = V::load(key, j), values[n] = V::load(value, j);
    }
    float score[Heads] = {};
#pragma unroll
    for (int n = 0; n < Each; ++n) {
      if (held && lane + n * a.lanes < vectors) {
        float numbers[W];
        keys[n].unpack(numbers);
#pragma unroll
        for (int h = 0; h < Heads; ++h)
#pragma unroll
          for (int i = 0; i < W; ++i) score[h] += query[h][n][i] * numbers[i];
      }
    }
    for (int distance = a.lanes / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int h = 0; h < Heads; ++h) score[h] += __shfl_xor_sync(0xffffffffu, score[h], distance);
    if (!held) continue;
    float weight[Heads], shrink[Heads];
#pragma unroll
    for (int h = 0; h < Heads; ++h) {
      const float higher = fmaxf(maximum[h], score[h] * a.scale);
      weight[h] = exp2f(score[h] * a.scale - higher), shrink[h] = exp2f(maximum[h] - higher);
      total[h] = total[h] * shrink[h] + weight[h];
      maximum[h] = higher;
    }
#pragma unroll
    for (int n = 0; n < Each; ++n) {
      if (lane + n * a.lanes < vectors) {
        float numbers[W];
        values[n].unpack(numbers);
#pragma unroll
        for (int h = 0; h < Heads; ++h)
#pragma unroll
          for (int i = 0; i < W; ++i)
            weighted[h][n][i] = weighted[h][n][i] * shrink[h] + weight[h] * numbers[i];
      }
    }
  }

  float *maxima = shared, *totals = maxima + teams, *sums = totals + teams;
#pragma unroll
  for (int h = 0; h < Heads; ++h) {
    if (h >= heads) break;
    if (lane == 0) maxima[team] = maximum[h], totals[team] = total[h];
#pragma unroll
    for (int n = 0; n < Each; ++n) {
      const int j = lane + n * a.lanes;
#pragma unroll
      for (int i = 0; i < W; ++i)
        if (j < vectors) sums[team * a.d + j * W + i] = weighted[h][n][i];
    }
    __syncthreads();
    float highest = -INFINITY, all = 0.f;
    for (int other = 0; other < teams; ++other) highest = fmaxf(highest, maxima[other]);
    // Teams without a token have the maximum -inf; of a sequence without one, all have.
    if (length == 0) highest = 0.f;
    for (int other = 0; other < teams; ++other)
      all += totals[other] * exp2f(maxima[other] - highest);
    const float inverse = length == 0 ? 0.f : 1.f / all;
    T* y = static_cast<T*>(a.y) +
           (sequence * a.kv_heads * a.group + first + h) * static_cast<int64_t>(a.d);
    for (int j = threadIdx.x; j < a.d; j += kThreads) {
      float sum[1] = {};
      for (int other = 0; other < teams; ++other)
        sum[0] += sums[other * a.d + j] * exp2f(maxima[other] - highest);
      sum[0] *= inverse;
      Vector<T, 1>::pack(sum).store(y, j);
    }
    __syncthreads();
  }
}

template <typename T, int W>
void launch_heads(Arguments& a, int64_t batch, int device, cudaStream_t stream) {
  const int vectors = a.d / W;
  for (a.lanes = 1; a.lanes < vectors && a.lanes < 32; a.lanes *= 2) {
  }
  auto with = [&](auto* kernel, int heads) {
    a.chunks = (a.group + heads - 1) / heads;
    const int teams = kThreads / a.lanes;
    launch(kernel, device, stream, batch * a.kv_heads * a.chunks, dim3(kThreads),
           int64_t{4} * teams * (a.d + 2), a);
  };
  if (vectors > 32)
    with(attend<T, W, 1, kMostEach>, 1);
  else if (a.group == 1)
    with(attend<T, W, 1, 1>, 1);
  else
    with(attend<T, W, kMostHeads, 1>, kMostHeads);
}

void launch_attention(Arguments& a, int64_t batch, DLDataType dtype, bool wide, int device,
                      cudaStream_t stream) {
  with_vectors(dtype, wide, [&](auto* type, auto w) {
    launch_heads<std::remove_pointer_t<decltype(type)>, w()>(a, batch, device, stream);
  });
}

}  // namespace

#ifndef __CUDA_ARCH__
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

namespace {

using tvm::ffi::TensorView;

Strides strides(const TensorView& pages) {
  return {pages.stride(0), pages.stride(1), pages.stride(2)};
}

bool aligned_pages(const TensorView& pages, int64_t bytes) {
  const Strides apart = strides(pages);
  return aligned(pages.data_ptr(), apart.page * bytes) && apart.token * bytes % 16 == 0 &&
         apart.head * bytes % 16 == 0;
}

void paged_attention(TensorView query, TensorView key_pages, TensorView value_pages,
                     TensorView block_table, TensorView lengths, double scale, TensorView y) {
  const int device = query.device().device_id;
  DeviceGuard on(device);
  const DLDataType dtype = query.dtype();
  const int64_t bytes = dtype.bits / 8;
  Arguments a{};
  a.query = query.data_ptr(), a.keys = key_pages.data_ptr(), a.values = value_pages.data_ptr();
  a.table = static_cast<const int*>(block_table.data_ptr());
  a.lengths = static_cast<const int*>(lengths.data_ptr());
  a.y = y.data_ptr();
  a.key = strides(key_pages), a.value = strides(value_pages);
  a.query_stride = query.stride(0), a.head_stride = query.stride(1);
  a.table_stride = block_table.stride(0);
  a.page = static_cast<int>(key_pages.size(1));
  a.kv_heads = static_cast<int>(key_pages.size(2));
  a.group = static_cast<int>(query.size(1)) / a.kv_heads;
  a.d = static_cast<int>(query.size(2));
  a.scale = static_cast<float>(scale * 1.4426950408889634);  // exp(x) = exp2(x · log2(e))
  const bool wide = a.d * bytes % 16 == 0 && aligned(a.query, a.query_stride * bytes) &&
                    a.head_stride * bytes % 16 == 0 && aligned_pages(key_pages, bytes) &&
                    aligned_pages(value_pages, bytes);
  const int most = 32 * kMostEach * (wide ? static_cast<int>(16 / bytes) : 1);
  if (a.d > most)
    TVM_FFI_THROW(ValueError) << KERNEL ": a head of " << a.d << " values is too large, " << most
                              << " are possible";
  launch_attention(a, query.size(0), dtype, wide, device, current_stream(device));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(paged_attention, paged_attention);
#endif
