# SPDX-License-Identifier: Apache-2.0
"""For kernels in CuPy that move vectors: what include/vectors.cuh is for those in CUDA C++."""

import cupy
import torch

BEGIN = r"""
// Vector: WIDTH neighbouring values of type T, which is float, or the bits of a half (FORMAT 1) or
// bfloat16 (FORMAT 2).
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
"""
"""How the source of such a kernel begins."""

_TYPES = {
    torch.float32: ("float", 0),
    torch.float16: ("unsigned short", 1),
    torch.bfloat16: ("unsigned short", 2),
}


def of_vectors(
    name: str, source: str, **constants: int
) -> dict[tuple[torch.dtype, int], cupy.RawKernel]:
    """(dtype, width) → the kernel ``name`` of BEGIN and ``source``, for vectors of 16 bytes and for
    single values; ``constants`` are defined in it. Compiled at the first launch, and kept in CuPy's
    cache folder."""
    return {
        (dtype, width): cupy.RawKernel(
            BEGIN + source,
            name,
            options=(
                "--std=c++17",
                f"-DELEMENT={element}",
                f"-DFORMAT={number}",
                f"-DWIDTH={width}",
                *(f"-D{constant}={value}" for constant, value in constants.items()),
            ),
        )
        for dtype, (element, number) in _TYPES.items()
        for width in (16 // dtype.itemsize, 1)
    }
