# SPDX-License-Identifier: Apache-2.0
"""Attention of one query per sequence to a paged cache as a CuPy RawKernel.

    query [B, Hq, D], key_pages and value_pages [P, page, Hkv, D] bfloat16, float16 or float32, unit
    inner stride, D up to 256 (more where rows are aligned to 16 bytes); block_table [B, W] and
    lengths [B] int32; y [B, Hq, D]. y = sum over t of softmax(scale · q · k[t]) · v[t], in float32,
    rounded once.

A block has one query head of a sequence, so keys and values come once from memory and again from L2
for the other heads that share them. A team of lanes reads a key, a vector each, adds up its
products by shuffles, and keeps a softmax of its own over every so many tokens: the running maximum,
the sum of powers below it, the weighted sum of values (Milakov and Gimelshein, Online normalizer
calculation for softmax, 2018). At the end the block adds its teams' results.
"""

import math

import cupy
import numpy
import torch

from custom_kernels import raw_kernels
from custom_kernels.paged_attention import empty_output

MIN_CAPABILITY = (8, 0)
"""Its conversion to bfloat16 needs it."""

THREADS = 256
MOST_EACH = 8
"""Vectors of a lane."""

SOURCE = r"""  // after raw_kernels.BEGIN
#define NONE __int_as_float(0xff800000)  // -inf

extern "C" __global__ void __launch_bounds__(256)
attend(const T* query, const T* keys, const T* values, const int* table, const int* lengths, T* y,
       long long query_stride, long long head_stride, long long key_page, long long key_token,
       long long key_head, long long value_page, long long value_token, long long value_head,
       long long table_stride, int page, int heads, int group, int d, int lanes, float scale) {
  extern __shared__ float shared[];  // [teams] maxima, [teams] sums, [teams][d] weighted values
  const int teams = blockDim.x / lanes, team = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const int vectors = d / W, head = blockIdx.x % heads, kv_head = head / group;
  const long long sequence = blockIdx.x / heads;
  const int length = lengths[sequence];

  const Vector* row = (const Vector*)(query + sequence * query_stride + head * head_stride);
  float q[EACH][W], weighted[EACH][W] = {}, maximum = NONE, total = 0.f;
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const int j = lane + n * lanes;
#pragma unroll
    for (int i = 0; i < W; ++i) q[n][i] = j < vectors ? widen(row[j].values[i]) : 0.f;
  }

#pragma unroll 1
  for (int start = 0; start < length; start += teams) {  // the same for all lanes of a warp
    const int token = start + team;
    const bool held = token < length;
    const long long number = held ? table[sequence * table_stride + token / page] : 0;
    const int place = token % page;
    const Vector* key =
        (const Vector*)(keys + number * key_page + place * key_token + kv_head * key_head);
    const Vector* value =
        (const Vector*)(values + number * value_page + place * value_token + kv_head * value_head);
    Vector k[EACH], v[EACH];
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const int j = lane + n * lanes;
      if (held && j < vectors) k[n] = key[j], v[n] = value[j];
    }
    float score = 0.f;
#pragma unroll
    for (int n = 0; n < EACH; ++n)
      if (held && lane + n * lanes < vectors)
#pragma unroll
        for (int i = 0; i < W; ++i) score += q[n][i] * widen(k[n].values[i]);
    for (int distance = lanes / 2; distance > 0; distance /= 2)
      score += __shfl_xor_sync(0xffffffffu, score, distance);
    if (!held) continue;
    const float higher = fmaxf(maximum, score * scale);
    const float weight = exp2f(score * scale - higher), shrink = exp2f(maximum - higher);
    total = total * shrink + weight;
    maximum = higher;
#pragma unroll
    for (int n = 0; n < EACH; ++n)
      if (lane + n * lanes < vectors)
#pragma unroll
        for (int i = 0; i < W; ++i)
          weighted[n][i] = weighted[n][i] * shrink + weight * widen(v[n].values[i]);
  }

  float *maxima = shared, *totals = maxima + teams, *sums = totals + teams;
  if (lane == 0) maxima[team] = maximum, totals[team] = total;
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const int j = lane + n * lanes;
#pragma unroll
    for (int i = 0; i < W; ++i)
      if (j < vectors) sums[team * d + j * W + i] = weighted[n][i];
  }
  __syncthreads();
  // Teams without a token have the maximum -inf; of a sequence without one, all have.
  float highest = length == 0 ? 0.f : NONE, all = 0.f;
  for (int other = 0; other < teams; ++other) highest = fmaxf(highest, maxima[other]);
  for (int other = 0; other < teams; ++other)
    all += totals[other] * exp2f(maxima[other] - highest);
  const float inverse = length == 0 ? 0.f : 1.f / all;
  for (int j = threadIdx.x; j < d; j += blockDim.x) {
    float sum = 0.f;
    for (int other = 0; other < teams; ++other)
      sum += sums[other * d + j] * exp2f(maxima[other] - highest);
    y[(long long)blockIdx.x * d + j] = narrow(sum * inverse);
  }
}
"""

ONE = raw_kernels.of_vectors("attend", SOURCE, EACH=1)
LARGE = SOURCE.replace("attend(", "attend_to_large_heads(")
SEVERAL = raw_kernels.of_vectors("attend_to_large_heads", LARGE, EACH=MOST_EACH)


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
    lanes = min(32, 1 << (vectors - 1).bit_length())
    teams = THREADS // lanes
    stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream(query.device))
    with cupy.cuda.Device(query.device.index), stream:
        (ONE if vectors <= 32 else SEVERAL)[query.dtype, width](
            (batch * heads,),
            (THREADS,),
            (
                *(
                    numpy.uintp(one.data_ptr())
                    for one in (query, key_pages, value_pages, block_table, lengths, y)
                ),
                *(
                    numpy.int64(stride)
                    for one, count in ((query, 2), (key_pages, 3), (value_pages, 3),
                                       (block_table, 1))
                    for stride in one.stride()[:count]
                ),
                *(numpy.int32(number) for number in (page, heads, heads // kv_heads, size, lanes)),
                numpy.float32(scale * math.log2(math.e)),
            ),
            shared_mem=4 * teams * (size + 2),
        )  # fmt: skip
    return y


def _rows_aligned(rows: torch.Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    apart = (stride * rows.element_size() for stride in rows.stride()[:-1])
    return rows.data_ptr() % 16 == 0 and all(bytes_apart % 16 == 0 for bytes_apart in apart)
