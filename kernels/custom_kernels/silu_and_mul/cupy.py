# SPDX-License-Identifier: Apache-2.0
"""y = silu(gate) · up as a CuPy RawKernel.

    x [M, 2K] bfloat16, float16 or float32, unit inner stride: gate is its first half, up its
    second; y [M, K]. y = round(round(gate / (1 + exp(-gate))) · up), in float32.

A thread has a vector of each half: 16 bytes, or a single value where rows are not aligned to that.
A row has one or several blocks.
"""

import cupy
import numpy
import torch

from custom_kernels import raw_kernels
from custom_kernels.silu_and_mul import empty_output

MIN_CAPABILITY = (8, 0)
"""Its conversion to bfloat16 needs it."""

THREADS = 256
"""Of a block, at most."""

SOURCE = r"""  // after raw_kernels.BEGIN
extern "C" __global__ void __launch_bounds__(256)
silu_and_mul(const Vector* x, Vector* y, long long stride, int vectors, int blocks_of_row) {
  const long long row = blockIdx.x / blocks_of_row;
  const int i = blockIdx.x % blocks_of_row * blockDim.x + threadIdx.x;
  if (i >= vectors) return;
  const Vector gate = x[row * stride + i], up = x[row * stride + vectors + i];
  Vector rounded;
  for (int j = 0; j < W; ++j) {
    const float value = widen(gate.values[j]);
    const float activated = widen(narrow(value / (1.f + expf(-value))));
    rounded.values[j] = narrow(activated * widen(up.values[j]));
  }
  y[row * vectors + i] = rounded;
}
"""

KERNELS = raw_kernels.of_vectors("silu_and_mul", SOURCE)


def run(x: torch.Tensor) -> torch.Tensor:
    """x [M, 2K], unit inner stride; returns y [M, K]."""
    y = empty_output(x)
    rows, k = y.shape
    stride = x.stride(0) if rows > 1 else 2 * k
    width = 16 // x.itemsize
    if k % width or stride % width or x.data_ptr() % 16:
        width = 1
    vectors = k // width
    threads = min(THREADS, -(-vectors // 32) * 32)
    blocks_of_row = -(-vectors // threads)
    stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream(x.device))
    with cupy.cuda.Device(x.device.index), stream:
        KERNELS[x.dtype, width](
            (rows * blocks_of_row,),
            (threads,),
            (
                numpy.uintp(x.data_ptr()),
                numpy.uintp(y.data_ptr()),
                numpy.int64(stride // width),
                numpy.int32(vectors),
                numpy.int32(blocks_of_row),
            ),
        )
    return y
