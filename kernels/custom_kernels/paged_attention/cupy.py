# SPDX-License-Identifier: Apache-2.0
"""Attention of one query per sequence to a paged cache as CuPy RawKernels.

    query [B, Hq, D], key_pages and value_pages [P, page, Hkv, D] bfloat16, float16 or float32, unit
    inner stride, D up to 256 (more where rows are aligned to 16 bytes); block_table [B, W] and
    lengths [B] int32; y [B, Hq, D]. y = sum over t of softmax(scale · q · k[t]) · v[t], in float32,
    rounded once.

A block has up to 4 of the query heads that share a key, and a part of a sequence; a second kernel
adds the parts. A team of lanes reads several keys, a vector of each, adds up its products by
shuffles, and keeps a softmax of its own over every so many tokens: the running maximum, the sum of
powers below it, the weighted sum of values (Milakov and Gimelshein, Online normalizer calculation
for softmax, 2018). At the end the block adds its teams' results. How many parts there are depends
on shapes alone: a CUDA graph can hold the launches.

With several heads its products take longer than the memory traffic; paged_attention.cuda leaves
them to the tensor cores.
"""

import math

import cupy
import numpy
import torch

from custom_kernels import raw_kernels
from custom_kernels.paged_attention import empty_output

MIN_CAPABILITY = (8, 0)
"""Its conversion to bfloat16 needs it."""

THREADS = 128
MOST_HEADS = 4
"""Of a block, where a lane has one vector of each."""
MOST_EACH = 8
"""Vectors of a lane, of one head."""
BLOCKS = 3
"""Wanted per multiprocessor."""
PARTS = 128
"""Of a sequence, at most."""
PART = 128
"""Tokens of the longest possible sequence for which another part is worth its second pass."""

POWER = r"""  // after raw_kernels.BEGIN
#define NONE __int_as_float(0xff800000)  // -inf, the maximum of no token

__device__ float power(float x, float highest) { return x == NONE ? 0.f : exp2f(x - highest); }
"""

ATTEND = r"""  // HEADS of a block, EACH: vectors of a lane, AHEAD: tokens of a team at once
extern "C" __global__ void __launch_bounds__(128)
attend(const T* query, const T* keys, const T* values, const int* table, const int* lengths, T* y,
       float* part_sums, float* part_maxima, float* part_totals, long long query_stride,
       long long head_stride, long long key_page, long long key_token, long long key_head,
       long long value_page, long long value_token, long long value_head, long long table_stride,
       int page, int kv_heads, int group, int d, int lanes, int parts, float scale) {
  extern __shared__ float shared[];  // [HEADS][teams] maxima, the same sums, and [d] values each
  const int teams = blockDim.x / lanes, team = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const int chunks = (group + HEADS - 1) / HEADS, chunk = blockIdx.x % chunks;
  const int part = blockIdx.x / chunks % parts, kv_head = blockIdx.x / chunks / parts % kv_heads;
  const long long sequence = blockIdx.x / chunks / parts / kv_heads;
  const int vectors = d / W, heads = min(HEADS, group - chunk * HEADS);
  const int first_head = kv_head * group + chunk * HEADS;
  const int length = lengths[sequence], each = length / parts, more = length % parts;
  const int first = part * each + min(part, more), last = first + each + (part < more);

  float q[HEADS][EACH][W], weighted[HEADS][EACH][W] = {}, maximum[HEADS], total[HEADS] = {};
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    maximum[h] = NONE;
    const Vector* row = (const Vector*)(query + sequence * query_stride +
                                        (first_head + min(h, heads - 1)) * head_stride);
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const int j = lane + n * lanes;
#pragma unroll
      for (int i = 0; i < W; ++i) q[h][n][i] = j < vectors ? widen(row[j].values[i]) : 0.f;
    }
  }

#pragma unroll 1
  for (int start = first; start < last; start += AHEAD * teams) {  // the same for all lanes
    Vector k[AHEAD][EACH], v[AHEAD][EACH];
    const auto held = [&](int u, int n) {
      return start + u * teams + team < last && lane + n * lanes < vectors;
    };
    float score[HEADS][AHEAD] = {};
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) {
      const int token = start + u * teams + team;
      if (token >= last) continue;
      const long long number = table[sequence * table_stride + token / page], place = token % page;
      const Vector* key =
          (const Vector*)(keys + number * key_page + place * key_token + kv_head * key_head);
      const Vector* value = (const Vector*)(values + number * value_page + place * value_token +
                                            kv_head * value_head);
#pragma unroll
      for (int n = 0; n < EACH; ++n) {
        const int j = lane + n * lanes;
        if (j < vectors) k[u][n] = key[j], v[u][n] = value[j];
      }
    }
#pragma unroll
    for (int u = 0; u < AHEAD; ++u)
#pragma unroll
      for (int n = 0; n < EACH; ++n)
#pragma unroll
        for (int h = 0; h < HEADS; ++h)
#pragma unroll
          for (int i = 0; held(u, n) && i < W; ++i)
            score[h][u] += q[h][n][i] * widen(k[u][n].values[i]);
    for (int distance = lanes / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int h = 0; h < HEADS; ++h)
#pragma unroll
        for (int u = 0; u < AHEAD; ++u)
          score[h][u] += __shfl_xor_sync(0xffffffffu, score[h][u], distance);
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      float higher = maximum[h];
#pragma unroll
      for (int u = 0; u < AHEAD; ++u) {
        score[h][u] = start + u * teams + team < last ? score[h][u] * scale : NONE;
        higher = fmaxf(higher, score[h][u]);
      }
      const float shrink = power(maximum[h], higher);
      maximum[h] = higher;
      total[h] *= shrink;
#pragma unroll
      for (int n = 0; n < EACH; ++n)
#pragma unroll
        for (int i = 0; i < W; ++i) weighted[h][n][i] *= shrink;
#pragma unroll
      for (int u = 0; u < AHEAD; ++u) {
        const float weight = power(score[h][u], higher);
        total[h] += weight;
#pragma unroll
        for (int n = 0; n < EACH; ++n)
#pragma unroll
          for (int i = 0; held(u, n) && i < W; ++i)
            weighted[h][n][i] += weight * widen(v[u][n].values[i]);
      }
    }
  }

  float *maxima = shared, *totals = maxima + HEADS * teams, *sums = totals + HEADS * teams;
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    if (lane == 0) maxima[h * teams + team] = maximum[h], totals[h * teams + team] = total[h];
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const int j = lane + n * lanes;
#pragma unroll
      for (int i = 0; i < W; ++i)
        if (j < vectors) sums[(h * teams + team) * d + j * W + i] = weighted[h][n][i];
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < heads * d; at += blockDim.x) {
    const int h = at / d, j = at % d;
    float highest = NONE, sum = 0.f, all = 0.f;
    for (int set = h * teams; set < (h + 1) * teams; ++set) highest = fmaxf(highest, maxima[set]);
    for (int set = h * teams; set < (h + 1) * teams; ++set) {
      const float shrink = power(maxima[set], highest);
      all += totals[set] * shrink;
      sum += sums[set * d + j] * shrink;
    }
    const long long row = sequence * kv_heads * group + first_head + h, result = row * parts + part;
    if (parts == 1) {
      y[row * d + j] = narrow(all == 0.f ? 0.f : sum / all);
    } else {
      part_sums[result * d + j] = sum;
      if (j == 0) part_maxima[result] = highest, part_totals[result] = all;
    }
  }
}
"""

ADD = r"""  // 32 values of y of one query head of one sequence; each warp adds every so many parts
extern "C" __global__ void __launch_bounds__(256)
add_parts(const float* part_sums, const float* part_maxima, const float* part_totals, T* y, int d,
          int parts) {
  __shared__ float sums[8][32], totals[8];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int columns = (d + 31) / 32, j = blockIdx.x % columns * 32 + lane;
  const long long row = blockIdx.x / columns, first = row * parts;
  float highest = NONE, all = 0.f, sum = 0.f;
  for (int part = lane; part < parts; part += 32)
    highest = fmaxf(highest, part_maxima[first + part]);
  for (int distance = 16; distance > 0; distance /= 2)
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, distance));
#pragma unroll 4
  for (int part = warp; part < parts; part += warps) {
    const float shrink = power(part_maxima[first + part], highest);
    all += part_totals[first + part] * shrink;
    if (j < d) sum += part_sums[(first + part) * d + j] * shrink;
  }
  sums[warp][lane] = sum, totals[warp] = all;
  __syncthreads();
  if (warp > 0 || j >= d) return;
  for (int other = 1; other < warps; ++other) sum += sums[other][lane], all += totals[other];
  y[row * d + j] = narrow(all == 0.f ? 0.f : sum / all);
}
"""

SEVERAL = raw_kernels.of_vectors("attend", POWER + ATTEND, HEADS=MOST_HEADS, EACH=1, AHEAD=4)
ONE = raw_kernels.of_vectors(
    "attend_to_large_heads",
    POWER + ATTEND.replace("attend(", "attend_to_large_heads("),
    HEADS=1,
    EACH=MOST_EACH,
    AHEAD=1,
)
SECOND = {
    dtype: kernel
    for (dtype, width), kernel in raw_kernels.of_vectors("add_parts", POWER + ADD).items()
    if width == 1
}


def run(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """query [B, Hq, D] and pages [P, page, Hkv, D], unit inner strides; returns y [B, Hq, D].

    Raises ValueError for a head of too many values.
    """
    y = empty_output(query)
    batch, heads, size = query.shape
    page, kv_heads = key_pages.shape[1:3]
    width = 16 // query.itemsize
    if size % width or not all(map(_rows_aligned, (query, key_pages, value_pages))):
        width = 1
    vectors = size // width
    if vectors > 32 * MOST_EACH:
        raise ValueError(
            f"paged_attention.cupy: a head of {size} values is too large, {32 * MOST_EACH * width} "
            "are possible"
        )
    kernels, together = (SEVERAL, MOST_HEADS) if vectors <= 32 else (ONE, 1)
    group = heads // kv_heads
    lanes = min(32, 1 << (vectors - 1).bit_length())
    teams = THREADS // lanes
    blocks = batch * kv_heads * -(-group // together)
    wanted = BLOCKS * torch.cuda.get_device_properties(query.device).multi_processor_count // blocks
    parts = max(1, min(wanted, block_table.shape[1] * page // PART, PARTS))
    rows = batch * heads * parts if parts > 1 else 0
    sums = query.new_empty((rows, size), dtype=torch.float32)
    maxima, totals = query.new_empty((2, rows), dtype=torch.float32)
    partial = [numpy.uintp(one.data_ptr()) for one in (sums, maxima, totals)]
    stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream(query.device))
    with cupy.cuda.Device(query.device.index), stream:
        kernels[query.dtype, width](
            (blocks * parts,),
            (THREADS,),
            (
                *(
                    numpy.uintp(one.data_ptr())
                    for one in (query, key_pages, value_pages, block_table, lengths, y)
                ),
                *partial,
                *(
                    numpy.int64(stride)
                    for one, count in ((query, 2), (key_pages, 3), (value_pages, 3),
                                       (block_table, 1))
                    for stride in one.stride()[:count]
                ),
                *(
                    numpy.int32(number)
                    for number in (page, kv_heads, group, size, lanes, parts)
                ),
                numpy.float32(scale * math.log2(math.e)),
            ),
            shared_mem=4 * together * teams * (size + 2),
        )  # fmt: skip
        if parts > 1:
            SECOND[query.dtype](
                (batch * heads * -(-size // 32),),
                (32 * min(parts, 8),),
                (*partial, numpy.uintp(y.data_ptr()), numpy.int32(size), numpy.int32(parts)),
            )
    return y


def _rows_aligned(rows: torch.Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    apart = (stride * rows.element_size() for stride in rows.stride()[:-1])
    return rows.data_ptr() % 16 == 0 and all(bytes_apart % 16 == 0 for bytes_apart in apart)
