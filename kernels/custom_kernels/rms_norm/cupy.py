# SPDX-License-Identifier: Apache-2.0
"""y, total = RMS norm of x + residual, and the sum, as a CuPy RawKernel.

    x, residual [M, K] bfloat16, float16 or float32, unit inner stride, residual or none; weight [K]
    of that dtype or float32, or none; y, total [M, K] of x's dtype. Per row, in float32:
    v = x + residual, total = round(v), y = round(round(v / sqrt(mean(v²) + epsilon)) · weight).

A row has a warp or a block. Each thread has up to KEPT vectors of a row in registers, from the sum
of squares to the product; of longer rows the rest is read twice. A vector is 16 bytes, or a single
value where rows are not aligned to that.
"""

import cupy
import numpy
import torch

from custom_kernels import raw_kernels
from custom_kernels.rms_norm import empty_output

MIN_CAPABILITY = (8, 0)
"""Its conversion to bfloat16 needs it."""

KEPT = 2
THREADS = 1024
"""Of a block, at most."""

SOURCE = r"""  // after raw_kernels.BEGIN
// Of the blockDim.x threads of a row, which are whole warps.
__device__ float sum_of_row(float value) {
  __shared__ float partial[32];
  for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffff, value, other);
  if (blockDim.x > 32) {  // then the block has one row
    const int lane = threadIdx.x % 32;
    if (lane == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = lane < blockDim.x / 32 ? partial[lane] : 0.f;
    for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffff, value, other);
  }
  return value;
}

extern "C" __global__ void __launch_bounds__(1024)
rms_norm(const Vector* x, const Vector* residual, const void* weight, Vector* y, Vector* total,
         long long rows, long long x_stride, long long residual_stride, int vectors,
         float inverse_k, float epsilon, bool wide_weight) {
  const long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows) return;  // whole warps
  const bool adds = residual != nullptr;
  x += row * x_stride, residual += row * residual_stride;  // in vectors
  y += row * vectors, total += row * vectors;

  float squares = 0.f;
  auto sum = [&](int i, float* v) {
    const Vector of_x = x[i];
    if (adds) {
      const Vector of_residual = residual[i];
      Vector rounded;
      for (int j = 0; j < W; ++j) {
        v[j] = widen(of_x.values[j]) + widen(of_residual.values[j]);
        rounded.values[j] = narrow(v[j]);
      }
      total[i] = rounded;
    } else {
      for (int j = 0; j < W; ++j) v[j] = widen(of_x.values[j]);
    }
  };
  auto normalize = [&](int i, float* v, float factor) {
    Vector rounded;
    for (int j = 0; j < W; ++j) {
      float value = v[j] * factor;
      if (weight && wide_weight)
        value *= ((const float*)weight)[i * W + j];
      else if (weight)
        value = widen(narrow(value)) * widen(((const T*)weight)[i * W + j]);
      rounded.values[j] = narrow(value);
    }
    y[i] = rounded;
  };

  float kept[KEPT][W], more[W];
  const int first = threadIdx.x, step = blockDim.x;
#pragma unroll
  for (int n = 0; n < KEPT; ++n)
    if (first + n * step < vectors) {
      sum(first + n * step, kept[n]);
      for (int j = 0; j < W; ++j) squares += kept[n][j] * kept[n][j];
    }
  for (int i = first + KEPT * step; i < vectors; i += step) {
    sum(i, more);
    for (int j = 0; j < W; ++j) squares += more[j] * more[j];
  }
  const float factor = rsqrtf(sum_of_row(squares) * inverse_k + epsilon);
#pragma unroll
  for (int n = 0; n < KEPT; ++n)
    if (first + n * step < vectors) normalize(first + n * step, kept[n], factor);
  for (int i = first + KEPT * step; i < vectors; i += step) {
    sum(i, more);
    normalize(i, more, factor);
  }
}
"""

KERNELS = raw_kernels.of_vectors("rms_norm", SOURCE, KEPT=KEPT)


def run(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual [M, K], unit inner stride, weight [K]; returns y [M, K] and the new residual,
    empty without one."""
    y, total = empty_output(x, residual, weight, epsilon)
    rows, k = x.shape
    width = 16 // x.itemsize
    inputs = [one for one in (x, residual, weight) if one is not None]
    if k % width or not all(_rows_aligned(one) for one in inputs):
        width = 1
    vectors = k // width
    threads = min(THREADS, -(-vectors // (KEPT * 32)) * 32)
    at_once = 4 if threads == 32 else 1

    def stride(one: torch.Tensor | None) -> int:
        return one.stride(0) // width if one is not None and rows > 1 else vectors

    stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream(x.device))
    with cupy.cuda.Device(x.device.index), stream:
        KERNELS[x.dtype, width](
            (-(-rows // at_once),),
            (threads, at_once),
            (
                *(
                    numpy.uintp(0 if one is None else one.data_ptr())
                    for one in (x, residual, weight, y, total)
                ),
                *(numpy.int64(number) for number in (rows, stride(x), stride(residual))),
                numpy.int32(vectors),
                numpy.float32(1 / k),
                numpy.float32(epsilon),
                numpy.bool_(weight is not None and weight.dtype != x.dtype),
            ),
        )
    return y, total


def _rows_aligned(matrix: torch.Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    apart = matrix.stride(0) if matrix.dim() == 2 and matrix.shape[0] > 1 else 0
    return (matrix.data_ptr() | apart * matrix.element_size()) % 16 == 0
