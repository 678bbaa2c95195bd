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

from custom_kernels.silu_and_mul import empty_output

MIN_CAPABILITY = (8, 0)
"""Its conversion to bfloat16 needs it."""

THREADS = 256
"""Of a block, at most."""

SOURCE = r"""
// The options say what these are: ELEMENT and FORMAT (0 float32, 1 float16, 2 bfloat16; the last
// two as bits), WIDTH (values of a vector).
using T = ELEMENT;
constexpr int W = WIDTH;

struct __align__(sizeof(T) * W) Vector { T values[W]; };

__device__ float widen(T value) {
#if FORMAT == 0
  return value;
#elif FORMAT == 1
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
  return wide;
#else
  return __uint_as_float((unsigned int)value << 16);
#endif
}

__device__ T narrow(float value) {
#if FORMAT == 0
  return value;
#else
  unsigned short bits;
#if FORMAT == 1
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
  return bits;
#endif
}

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

_TYPES = {
    torch.float32: ("float", 0),
    torch.float16: ("unsigned short", 1),
    torch.bfloat16: ("unsigned short", 2),
}


def _kernel(dtype: torch.dtype, width: int) -> cupy.RawKernel:
    element, number = _TYPES[dtype]
    values = {"ELEMENT": element, "FORMAT": number, "WIDTH": width}
    options = ("--std=c++17", *(f"-D{name}={value}" for name, value in values.items()))
    return cupy.RawKernel(SOURCE, "silu_and_mul", options=options)


# Compiled at the first launch, and kept in CuPy's cache folder.
KERNELS = {
    (dtype, width): _kernel(dtype, width) for dtype in _TYPES for width in (16 // dtype.itemsize, 1)
}


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
