# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding of queries and keys as a CuPy RawKernel.

    query [M, heads · D] and key, which may be none, bfloat16, float16 or float32, unit inner
    stride, any row stride; positions [M] int64; cache [P, R] of that dtype or float32. Pair (a, b)
    of a head becomes (a · cos - b · sin, b · cos + a · sin), in float32, rounded once.

A block has a token, a thread the angles of a vector of pairs and the values of one head after the
other. A vector is 16 bytes, or a single value where rows are not aligned to that.
"""

import cupy
import numpy
import torch

from custom_kernels import raw_kernels
from custom_kernels.rotary_embedding import empty_output

MIN_CAPABILITY = (8, 0)
"""Its conversion to bfloat16 needs it."""

THREADS = 256
"""Of a block, at most."""

SOURCE = r"""  // after raw_kernels.BEGIN
extern "C" __global__ void __launch_bounds__(256)
rotary_embedding(const T* query, const T* key, const long long* positions, const void* cache,
                 T* rotated, T* rotated_key, long long query_stride, long long key_stride,
                 int heads, int kv_heads, int head_size, int half, bool is_neox, bool wide_cache) {
  const long long row = blockIdx.x;
  query += row * query_stride, key += row * key_stride;
  rotated += row * heads * head_size, rotated_key += row * kv_heads * head_size;
  const int all = heads + kv_heads, vectors = half / W;
  auto from = [&](int head) {
    return (const Vector*)(head < heads ? query + head * head_size
                                        : key + (head - heads) * head_size);
  };
  auto to = [&](int head) {
    return (Vector*)(head < heads ? rotated + head * head_size
                                  : rotated_key + (head - heads) * head_size);
  };

  const long long angles = positions[row] * 2 * half;
  for (int j = threadIdx.x; j < vectors; j += blockDim.x) {
    float cos[W], sin[W];
    for (int i = 0; i < W; ++i) {
      const long long place = angles + j * W + i;
      cos[i] = wide_cache ? ((const float*)cache)[place] : widen(((const T*)cache)[place]);
      sin[i] = wide_cache ? ((const float*)cache)[place + half]
                          : widen(((const T*)cache)[place + half]);
    }
    // Both kinds of pairs are in two vectors: the same place of each, or neighbours of both.
    const int first = is_neox ? j : 2 * j, second = is_neox ? vectors + j : 2 * j + 1;
    for (int head = threadIdx.y; head < all; head += blockDim.y) {
      const Vector x[2] = {from(head)[first], from(head)[second]};
      Vector y[2];
      if (is_neox) {
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const float a = widen(x[0].values[i]), b = widen(x[1].values[i]);
          y[0].values[i] = narrow(a * cos[i] - b * sin[i]);
          y[1].values[i] = narrow(b * cos[i] + a * sin[i]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const int p = 2 * i / W, q = (2 * i + 1) / W;  // the vectors, and the places in them
          const float a = widen(x[p].values[2 * i % W]), b = widen(x[q].values[(2 * i + 1) % W]);
          y[p].values[2 * i % W] = narrow(a * cos[i] - b * sin[i]);
          y[q].values[(2 * i + 1) % W] = narrow(b * cos[i] + a * sin[i]);
        }
      }
      to(head)[first] = y[0], to(head)[second] = y[1];
    }
  }
  for (int j = 2 * vectors + threadIdx.x; j < head_size / W; j += blockDim.x)
    for (int head = threadIdx.y; head < all; head += blockDim.y) to(head)[j] = from(head)[j];
}
"""

KERNELS = raw_kernels.of_vectors("rotary_embedding", SOURCE)


def run(
    query: torch.Tensor,
    key: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    is_neox: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query and key [M, heads · head_size], unit inner stride; returns both, the key empty without
    one."""
    rotated, rotated_key = empty_output(query, key, positions, cos_sin_cache, head_size, is_neox)
    rows = query.shape[0]
    heads = query.shape[1] // head_size
    kv_heads = 0 if key is None else key.shape[1] // head_size
    half = cos_sin_cache.shape[1] // 2
    width = 16 // query.itemsize
    inputs = [one for one in (query, key) if one is not None]
    if head_size % width or half % width or not all(_rows_aligned(one) for one in inputs):
        width = 1
    lanes = min(half // width, 32)
    stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream(query.device))
    with cupy.cuda.Device(query.device.index), stream:
        KERNELS[query.dtype, width](
            (rows,),
            (lanes, min(heads + kv_heads, THREADS // lanes)),
            (
                *(
                    numpy.uintp(0 if one is None else one.data_ptr())
                    for one in (query, key, positions, cos_sin_cache, rotated, rotated_key)
                ),
                numpy.int64(query.stride(0)),
                numpy.int64(0 if key is None else key.stride(0)),
                *(numpy.int32(number) for number in (heads, kv_heads, head_size, half)),
                numpy.bool_(is_neox),
                numpy.bool_(cos_sin_cache.dtype != query.dtype),
            ),
        )
    return rotated, rotated_key


def _rows_aligned(matrix: torch.Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    apart = matrix.stride(0) if matrix.shape[0] > 1 else 0
    return (matrix.data_ptr() | apart * matrix.element_size()) % 16 == 0
