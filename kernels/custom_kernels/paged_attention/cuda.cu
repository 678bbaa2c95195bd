// SPDX-License-Identifier: Apache-2.0
//
// Attention of one query per sequence to a paged cache: y = sum over t of
// softmax(scale · q · k[t]) · v[t].
//
//   query [B, Hq, D], key_pages and value_pages [P, page, Hkv, D] float32, float16 or bfloat16,
//   unit inner stride, D up to 256 (more where rows are aligned to 16 bytes); block_table [B, W]
//   and lengths [B] int32; y [B, Hq, D] of query's dtype. In float32, rounded once; on the tensor
//   cores the softmax is rounded to query's dtype before it multiplies the values.
//
// The work is memory traffic: keys and values in, each once for up to 8 of the query heads that
// share them. A sequence is split into parts, a block each, as many as a GPU holds at once; a
// second kernel adds their results in a fixed order. How many parts there are depends on shapes
// alone and never on lengths, which only the device knows: a CUDA graph can hold the launches.
//
//   attend            half and bfloat16, aligned, D up to 256. The tensor cores multiply:
//                     with 7 heads of 128 the sums alone would keep the other units of an H200
//                     busy for 60 % of the time that its 4.8 TB/s need. A warp has 16 or 32
//                     tokens at a time, and all of its lanes' loads are of 16 bytes, from
//                     memory straight into the registers that the tensor cores read: the next
//                     keys and values are on their way while these are multiplied. That works
//                     without shared memory because a sum may run in any order: over the values
//                     of a head in scores, and the rows of a tile of y may be any values of it.
//
//                       scores [tokens, heads]  = keys [tokens, D] · query [D, heads]
//                       y [D, heads]           += values [D, tokens] · weights [tokens, heads]
//
//   attend_by_lanes   everything else. A team of lanes reads a key, a vector each, and adds up its
//                     products by shuffles, for 4 heads at a time and several tokens.
//   add_parts         the second kernel.
//
// Each warp or team keeps a softmax of its own over every so many tokens: the running maximum, the
// sum of powers below it, the weighted sum of values (Milakov and Gimelshein, Online normalizer
// calculation for softmax, 2018). The split is known as Flash-Decoding (Dao et al., 2023).
//
// Each launch overlaps the kernel before it and the one after it.
//
// spills: a few words, for heads of 256 values and, on 8.0, of 128

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <functional>

#define KERNEL "paged_attention.cuda"
#include "include/device.cuh"
#include "include/vectors.cuh"

namespace {

using namespace custom_kernels;

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kColumns = 8;    // heads of a block of attend, the width of a tensor core's tile
constexpr int kMostHeads = 4;  // of a block of attend_by_lanes
constexpr int kMostEach = 8;   // vectors of a lane there
constexpr int kAtOnce = 3;     // blocks in a multiprocessor
constexpr int kMostParts = 128;
constexpr int kPart = 128;  // tokens for which another part is worth its second pass

struct Strides {
  int64_t page, token, head;  // in elements
};

struct Arguments {
  const void *query, *keys, *values;
  const int *table, *lengths;
  void* y;
  float *sums, *maxima, *totals;  // of parts: [B, Hq, parts, D], [B, Hq, parts] twice
  Strides key, value;
  int64_t query_stride, head_stride, table_stride;
  unsigned page;  // tokens of one
  int kv_heads, group, d;
  int chunks;   // of the query heads that share a key head
  int parts;    // of a sequence
  int lanes;    // of a team, a power of two
  float scale;  // of powers of two
};

// exp2(x - highest), where -inf means that there is no token.
__device__ float power(float x, float highest) { return x == -INFINITY ? 0.f : exp2f(x - highest); }

// What a block computes: a part of a sequence for some of the heads that share a key.
struct Task {
  int64_t sequence, row;  // the row of y of the first head
  int kv_head, heads, part, first, last;

  // Tokens are shared out in tiles, so that each part starts with one.
  __device__ Task(const Arguments& a, int most_heads, int tile) {
    int64_t rest = blockIdx.x;
    const int chunk = static_cast<int>(rest % a.chunks);
    part = static_cast<int>((rest /= a.chunks) % a.parts);
    kv_head = static_cast<int>((rest /= a.parts) % a.kv_heads);
    sequence = rest / a.kv_heads;
    heads = min(most_heads, a.group - chunk * most_heads);
    row = (sequence * a.kv_heads + kv_head) * a.group + chunk * most_heads;
    const int length = a.lengths[sequence], tiles = (length + tile - 1) / tile;
    const int each = tiles / a.parts, more = tiles % a.parts;
    first = (part * each + min(part, more)) * tile;
    last = min(first + (each + (part < more)) * tile, length);
  }
  template <typename T>
  __device__ const T* query(const Arguments& a, int head) const {
    return static_cast<const T*>(a.query) + sequence * a.query_stride +
           (row - sequence * a.kv_heads * a.group + head) * a.head_stride;
  }
};

// Adds what the warps or teams of a block have left in shared memory, maxima and totals
// [heads][sets], sums [heads][sets][d], and writes y or what add_parts needs.
template <typename T>
__device__ void add_sets(const Arguments& a, const Task& task, const float* maxima, int sets) {
  const float *totals = maxima + task.heads * sets, *sums = totals + task.heads * sets;
  __syncthreads();
  for (int i = threadIdx.x; i < task.heads * a.d; i += kThreads) {
    const int head = i / a.d, j = i % a.d;
    float highest = -INFINITY, total = 0.f, sum[1] = {};
    for (int set = head * sets; set < (head + 1) * sets; ++set)
      highest = fmaxf(highest, maxima[set]);
    for (int set = head * sets; set < (head + 1) * sets; ++set) {
      const float shrink = power(maxima[set], highest);
      total += totals[set] * shrink;
      sum[0] += sums[set * a.d + j] * shrink;
    }
    const int64_t row = task.row + head, place = row * a.parts + task.part;
    if (a.parts == 1) {
      sum[0] = total == 0.f ? 0.f : sum[0] / total;
      Vector<T, 1>::pack(sum).store(static_cast<T*>(a.y), row * a.d + j);
    } else {
      a.sums[place * a.d + j] = sum[0];
      if (j == 0) a.maxima[place] = highest, a.totals[place] = total;
    }
  }
}

// ---- On the tensor cores -----------------------------------------------------------------------

// c [16, 8] += a [16, 16] · b [16, 8]. With g = lane / 4 and t = lane % 4 a lane has rows g and
// g + 8 of a in turn, at columns 2t and 2t + 1 (a0, a1) and 8 more (a2, a3); column g of b, at
// these places; rows g (c[0], c[1]) and g + 8 of c, at columns 2t and 2t + 1.
__device__ void multiply(__nv_bfloat16, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                         uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ void multiply(__half, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Of an 8 x 8 matrix, of which a lane has row g at columns 2t and 2t + 1.
__device__ uint32_t transpose(uint32_t pair) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// For heads of at most D values, Steps times 16 tokens of a warp at a time.
template <typename T, int D, int Steps>
__global__ void __launch_bounds__(kThreads, D <= 128 ? kAtOnce : 2)
    attend(const __grid_constant__ Arguments a) {
  using V = Vector<T, 8>;
  constexpr int kTile = 16 * Steps, kStride = kWarps * kTile;
  constexpr bool kBoth = D <= 128;  // registers hold keys and values at once
  extern __shared__ float shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int vectors = a.d / 8;
  take_turn();
  const Task task(a, kColumns, kTile);
  const int* table = a.table + task.sequence * a.table_stride;
  const T* all_keys = static_cast<const T*>(a.keys) + task.kv_head * a.key.head + 8 * t;
  const T* all_values = static_cast<const T*>(a.values) + task.kv_head * a.value.head + 8 * g;

  // Each lane finds one token of the tile, whose page it looks up a tile ahead.
  int64_t key_row, value_row;
  auto page_of = [&](int start) {
    const int token = start + lane % kTile;
    return token < task.last ? table[token / a.page] : 0;
  };
  auto locate = [&](int start, int page) {
    const int place = (start + lane % kTile) % a.page;
    key_row = page * a.key.page + place * a.key.token;
    value_row = page * a.value.page + place * a.value.token;
  };
  // Token g, and g + 8, of each step: vectors t, t + 4, ... are columns of the matrix in an order
  // of its own, the same as the query's.
  uint4 keys[Steps][2][D / 32];
  auto load_keys = [&](int start) {
#pragma unroll
    for (int row = 0; row < 2 * Steps; ++row) {
      const int token = 8 * row + g;
      const T* key = all_keys + __shfl_sync(kAll, key_row, token);
#pragma unroll
      for (int n = 0; n < D / 32; ++n)
        keys[row / 2][row % 2][n] = start + token < task.last && 4 * n + t < vectors
                                        ? V::load(key, 4 * n).raw
                                        : make_uint4(0, 0, 0, 0);
    }
  };
  // Tokens 2t, 2t + 1, 2t + 8, 2t + 9 of each step: values 8g to 8g + 7 of every 64. What is behind
  // the end may be NaN.
  uint4 values[Steps][4][D / 64];
  auto load_values = [&](int start) {
#pragma unroll
    for (int i = 0; i < 4 * Steps; ++i) {
      const int token = 8 * (i / 2) + 2 * t + i % 2;
      const T* value = all_values + __shfl_sync(kAll, value_row, token);
#pragma unroll
      for (int n = 0; n < D / 64; ++n)
        values[i / 4][i % 4][n] = start + token < task.last && 8 * n + g < vectors
                                      ? V::load(value, 8 * n).raw
                                      : make_uint4(0, 0, 0, 0);
    }
  };

  int start = task.first + warp * kTile;
  locate(start, page_of(start));
  int page = page_of(start + kStride);
  auto load_next_keys = [&] {
    locate(start + kStride, page);
    page = page_of(start + 2 * kStride);
    load_keys(start + kStride);
  };
  load_keys(start);
  if (kBoth) load_values(start);
  uint4 query[D / 32];  // of head g
#pragma unroll
  for (int n = 0; n < D / 32; ++n)
    query[n] = g < task.heads && 4 * n + t < vectors
                   ? V::load_shared(task.query<T>(a, g), 4 * n + t).raw
                   : make_uint4(0, 0, 0, 0);
  // Of heads 2t and 2t + 1.
  float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {}, weighted[D / 64][4][4] = {};

#pragma unroll 1
  for (; start < task.last; start += kStride) {
    float scores[Steps][4] = {};  // token g and a head each, then token g + 8
#pragma unroll
    for (int n = 0; n < D / 32; ++n)
#pragma unroll
      for (int step = 0; step < Steps; ++step) {
        const uint4 low = keys[step][0][n], high = keys[step][1][n], q = query[n];
        multiply(T{}, scores[step], low.x, high.x, low.y, high.y, q.x, q.y);
        multiply(T{}, scores[step], low.z, high.z, low.w, high.w, q.z, q.w);
      }
    kBoth ? load_next_keys() : load_values(start);

    float shrink[2];
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      float higher = maximum[head];
#pragma unroll
      for (int row = 0; row < 2 * Steps; ++row) {
        float& score = scores[row / 2][row % 2 * 2 + head];
        score = start + 8 * row + g < task.last ? score * a.scale : -INFINITY;
        higher = fmaxf(higher, score);
      }
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2)
        higher = fmaxf(higher, __shfl_xor_sync(kAll, higher, distance));
      // Every tile has a token, so from here on the maximum is finite.
      shrink[head] = exp2f(maximum[head] - higher);
      maximum[head] = higher;
      total[head] *= shrink[head];
#pragma unroll
      for (int row = 0; row < 2 * Steps; ++row) {
        float& score = scores[row / 2][row % 2 * 2 + head];
        score = exp2f(score - higher);  // now a weight
        total[head] += score;
      }
    }
#pragma unroll
    for (int n = 0; n < D / 64; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) weighted[n][j][i] *= shrink[i % 2];
#pragma unroll
    for (int step = 0; step < Steps; ++step) {
      const uint32_t b0 = transpose(pack(T{}, scores[step][0], scores[step][1]));
      const uint32_t b1 = transpose(pack(T{}, scores[step][2], scores[step][3]));
#pragma unroll
      for (int n = 0; n < D / 64; ++n) {
        auto pairs = [&](float (&c)[4], uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
          // Row g is the first of two neighbouring values, row g + 8 the second.
          multiply(T{}, c, __byte_perm(v0, v1, 0x5410), __byte_perm(v0, v1, 0x7632),
                   __byte_perm(v2, v3, 0x5410), __byte_perm(v2, v3, 0x7632), b0, b1);
        };
        const uint4 v0 = values[step][0][n], v1 = values[step][1][n], v2 = values[step][2][n],
                    v3 = values[step][3][n];
        pairs(weighted[n][0], v0.x, v1.x, v2.x, v3.x);
        pairs(weighted[n][1], v0.y, v1.y, v2.y, v3.y);
        pairs(weighted[n][2], v0.z, v1.z, v2.z, v3.z);
        pairs(weighted[n][3], v0.w, v1.w, v2.w, v3.w);
      }
    }
    kBoth ? load_values(start + kStride) : load_next_keys();
  }

  float *maxima = shared, *totals = maxima + task.heads * kWarps,
        *sums = totals + task.heads * kWarps;
#pragma unroll
  for (int head = 0; head < 2; ++head) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2)
      total[head] += __shfl_xor_sync(kAll, total[head], distance);
    if (2 * t + head >= task.heads) continue;
    const int set = (2 * t + head) * kWarps + warp;
    if (g == 0) maxima[set] = maximum[head], totals[set] = total[head];
#pragma unroll
    for (int n = 0; n < D / 64; ++n)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int j = 64 * n + 8 * g + i;
        if (j < a.d) sums[set * a.d + j] = weighted[n][i / 2][i % 2 * 2 + head];
      }
  }
  add_sets<T>(a, task, shared, kWarps);
}

// ---- By lanes
// ------------------------------------------------------------------------------------

// Each lane of a team has Each vectors of W values, of Heads query heads, and of Ahead tokens.
template <typename T, int W, int Heads, int Each, int Ahead>
__global__ void __launch_bounds__(kThreads) attend_by_lanes(const __grid_constant__ Arguments a) {
  using V = Vector<T, W>;
  extern __shared__ float shared[];
  const int teams = kThreads / a.lanes, team = threadIdx.x / a.lanes, lane = threadIdx.x % a.lanes;
  const int vectors = a.d / W;
  take_turn();
  const Task task(a, Heads, 1);
  const int* table = a.table + task.sequence * a.table_stride;

  float query[Heads][Each][W], weighted[Heads][Each][W], maximum[Heads], total[Heads];
#pragma unroll
  for (int h = 0; h < Heads; ++h) {
    maximum[h] = -INFINITY, total[h] = 0.f;
    const T* row = task.query<T>(a, min(h, task.heads - 1));
#pragma unroll
    for (int n = 0; n < Each; ++n) {
      const int j = lane + n * a.lanes;
#pragma unroll
      for (int i = 0; i < W; ++i) query[h][n][i] = weighted[h][n][i] = 0.f;
      if (j < vectors) V::load_shared(row, j).unpack(query[h][n]);
    }
  }

#pragma unroll 1
  for (int start = task.first; start < task.last; start += Ahead * teams) {  // same in all lanes
    V keys[Ahead][Each] = {}, values[Ahead][Each] = {};
    float score[Heads][Ahead] = {};
#pragma unroll
    for (int u = 0; u < Ahead; ++u) {
      const int token = start + u * teams + team;
      if (token >= task.last) continue;
      const int64_t page = table[token / a.page], place = token % a.page;
      const T* key = static_cast<const T*>(a.keys) + page * a.key.page + place * a.key.token +
                     task.kv_head * a.key.head;
      const T* value = static_cast<const T*>(a.values) + page * a.value.page +
                       place * a.value.token + task.kv_head * a.value.head;
#pragma unroll
      for (int n = 0; n < Each; ++n) {
        const int j = lane + n * a.lanes;
        if (j < vectors) keys[u][n] = V::load(key, j), values[u][n] = V::load(value, j);
      }
    }
#pragma unroll
    for (int u = 0; u < Ahead; ++u)
#pragma unroll
      for (int n = 0; n < Each; ++n) {
        float numbers[W];
        keys[u][n].unpack(numbers);
#pragma unroll
        for (int h = 0; h < Heads; ++h)
#pragma unroll
          for (int i = 0; i < W; ++i) score[h][u] += query[h][n][i] * numbers[i];
      }
    for (int distance = a.lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int h = 0; h < Heads; ++h) {
#pragma unroll
        for (int u = 0; u < Ahead; ++u) score[h][u] += __shfl_xor_sync(kAll, score[h][u], distance);
      }
    }
#pragma unroll
    for (int h = 0; h < Heads; ++h) {
      float higher = maximum[h];
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
        const bool held = start + u * teams + team < task.last;
        score[h][u] = held ? score[h][u] * a.scale : -INFINITY;
        higher = fmaxf(higher, score[h][u]);
      }
      const float shrink = power(maximum[h], higher);
      maximum[h] = higher;
      total[h] *= shrink;
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
        score[h][u] = power(score[h][u], higher);  // now a weight
        total[h] += score[h][u];
      }
#pragma unroll
      for (int n = 0; n < Each; ++n)
#pragma unroll
        for (int i = 0; i < W; ++i) weighted[h][n][i] *= shrink;
    }
#pragma unroll
    for (int u = 0; u < Ahead; ++u)
#pragma unroll
      for (int n = 0; n < Each; ++n) {
        float numbers[W];
        values[u][n].unpack(numbers);
#pragma unroll
        for (int h = 0; h < Heads; ++h)
#pragma unroll
          for (int i = 0; i < W; ++i) weighted[h][n][i] += score[h][u] * numbers[i];
      }
  }

  float *maxima = shared, *totals = maxima + task.heads * teams,
        *sums = totals + task.heads * teams;
#pragma unroll
  for (int h = 0; h < Heads; ++h) {
    if (h >= task.heads) break;
    const int set = h * teams + team;
    if (lane == 0) maxima[set] = maximum[h], totals[set] = total[h];
#pragma unroll
    for (int n = 0; n < Each; ++n) {
      const int j = lane + n * a.lanes;
#pragma unroll
      for (int i = 0; i < W; ++i)
        if (j < vectors) sums[set * a.d + j * W + i] = weighted[h][n][i];
    }
  }
  add_sets<T>(a, task, shared, teams);
}

// ---- The second kernel
// ---------------------------------------------------------------------------

// 32 values of y of one query head of one sequence; each warp adds every so many parts.
template <typename T>
__global__ void __launch_bounds__(256) add_parts(const __grid_constant__ Arguments a) {
  __shared__ float sums[8][32], totals[8];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int columns = (a.d + 31) / 32, j = blockIdx.x % columns * 32 + lane;
  const int64_t row = blockIdx.x / columns, first = row * a.parts;
  take_turn();
  float highest = -INFINITY, total = 0.f, sum[1] = {};
  for (int part = lane; part < a.parts; part += 32)
    highest = fmaxf(highest, a.maxima[first + part]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    highest = fmaxf(highest, __shfl_xor_sync(kAll, highest, distance));
#pragma unroll 4
  for (int part = warp; part < a.parts; part += warps) {
    const float shrink = power(a.maxima[first + part], highest);
    total += a.totals[first + part] * shrink;
    if (j < a.d) sum[0] += a.sums[(first + part) * a.d + j] * shrink;
  }
  sums[warp][lane] = sum[0], totals[warp] = total;
  __syncthreads();
  if (warp > 0 || j >= a.d) return;
  for (int other = 1; other < warps; ++other) sum[0] += sums[other][lane], total += totals[other];
  sum[0] = total == 0.f ? 0.f : sum[0] / total;
  Vector<T, 1>::pack(sum).store(static_cast<T*>(a.y), row * a.d + j);
}

// ---- The launches
// --------------------------------------------------------------------------------

// As many parts as make one wave on the GPU of `blocks`, those that there would be without. Where
// these are more than a wave, as few as nearly fill the last wave, or make it one of many.
int parts(int64_t blocks, int64_t longest, int device) {
  const int64_t wave = int64_t{kAtOnce} * Device::get(device).multiprocessors;
  const int64_t most = std::clamp<int64_t>(longest / kPart, 1, kMostParts);
  if (blocks <= wave) return static_cast<int>(std::min(wave / blocks, most));
  for (int parts = 1; parts < most; ++parts) {
    const int64_t all = blocks * parts, last = (all - 1) % wave + 1;
    if (last * 8 >= wave * 7 || all >= wave * 8) return parts;
  }
  return static_cast<int>(most);
}

struct Launch {
  Arguments& a;
  int64_t batch, longest;  // the most tokens that the block table has room for
  int device;
  cudaStream_t stream;
  std::function<float*(int64_t)> allocate;  // so many floats

  // The kernel with so many heads of a block, `sets` in it, and then the second one.
  template <typename T>
  void run(void (*kernel)(Arguments), int heads, int sets) {
    const int64_t rows = batch * a.kv_heads * a.group;
    a.chunks = (a.group + heads - 1) / heads;
    const int64_t blocks = batch * a.kv_heads * a.chunks;
    a.parts = parts(blocks, longest, device);
    if (a.parts > 1) {
      const int64_t results = rows * a.parts;
      a.sums = allocate(results * (a.d + 2));
      a.maxima = a.sums + results * a.d, a.totals = a.maxima + results;
    }
    launch(kernel, device, stream, blocks * a.parts, dim3(kThreads),
           int64_t{4} * std::min(heads, a.group) * sets * (a.d + 2), a);
    if (a.parts > 1)
      launch(add_parts<T>, device, stream, rows * ((a.d + 31) / 32),
             dim3(32 * std::min(a.parts, 8)), 0, a);
  }

  template <typename T, int W>
  void operator()() {
    const int vectors = a.d / W;
    for (a.lanes = 1; a.lanes < vectors && a.lanes < 32; a.lanes *= 2) {
    }
    const int teams = kThreads / a.lanes;
    if constexpr (W == 8)
      if (a.d <= 256)
        return a.d <= 64    ? run<T>(attend<T, 64, 2>, kColumns, kWarps)
               : a.d <= 128 ? run<T>(attend<T, 128, 1>, kColumns, kWarps)
                            : run<T>(attend<T, 256, 1>, kColumns, kWarps);
    if (W == 8 || vectors > 32)
      run<T>(attend_by_lanes<T, W, 1, kMostEach, 1>, 1, teams);
    else
      run<T>(attend_by_lanes < T, W == 8 ? 1 : W, kMostHeads, 1, 4 >, kMostHeads, teams);
  }
};

void launch_attention(Launch& launch, DLDataType dtype, bool wide) {
  with_vectors(dtype, wide, [&](auto* type, auto w) {
    launch.operator()<std::remove_pointer_t<decltype(type)>, w()>();
  });
}

}  // namespace

#ifndef __CUDA_ARCH__
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

namespace {

using tvm::ffi::Tensor;
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
  a.page = static_cast<unsigned>(key_pages.size(1));
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
  Tensor memory;
  Launch launch{a,
                query.size(0),
                block_table.size(1) * a.page,
                device,
                current_stream(device),
                [&](int64_t floats) {
                  // From torch's allocator, which hands it out again only behind these launches,
                  // and during a capture from the graph's own pool.
                  memory = Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, {floats},
                                                DLDataType{kDLFloat, 32, 1}, query.device());
                  return static_cast<float*>(memory.data_ptr());
                }};
  launch_attention(launch, dtype, wide);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(paged_attention, paged_attention);
#endif
