# SPDX-License-Identifier: Apache-2.0
"""q, scale = per-token quantization of x, expanded for a (2N-2):2N pattern, as a CuPy RawKernel.

    x [M, K] bfloat16 or float16, unit inner stride; q [M, K'] int8 or float8_e4m3fn;
    scale [M] float32. What is right is in reference.py, bit for bit; the order of a row of q in
    custom_kernels.sparsity.

A block has a row: it copies it into shared memory and finds the maximum on the way, then every
thread quantizes one window at a time, four values that are two neighbouring pairs, and writes it as
one word. One kernel serves every pattern: N is an argument.
"""

import cupy
import numpy
import torch

from custom_kernels import sparsity
from custom_kernels.quant_expand import empty_output

STAGED_BYTES = 47 * 1024
"""The largest row that is kept in shared memory; longer ones are read twice."""

SOURCE = r"""
// Compiled for bfloat16 (BF16=1) or float16 in, int8 (INT8=1) or float8_e4m3fn out.
#if INT8
#define QMAX 127.f
#else
#define QMAX 448.f
#endif

__device__ float value(unsigned int half_word) {  // of the low 16 bits
#if BF16
  return __uint_as_float(half_word << 16);
#else
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"((unsigned short)half_word));
  return wide;
#endif
}

// CuPy compiles with -ftz=true, which takes subnormal numbers for zeros. PTX says otherwise.
__device__ float multiply(float a, float b) {
  float product;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
}

__device__ float divide(float a, float b) {
  float quotient;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
  return quotient;
}

// Two quantized values in 16 bits.
__device__ unsigned int encode(float low, float high) {
#if INT8
  return (__float2int_rn(low) & 0xff) | (__float2int_rn(high) & 0xff) << 8;
#elif __CUDA_ARCH__ >= 890
  unsigned short both;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(both) : "f"(low), "f"(high));
  return both;
#else
  unsigned int both = 0;
  for (int i = 0; i < 2; ++i) {
    float v = i ? high : low;
    unsigned int bits = __float_as_uint(v), size = bits & 0x7fffffff;
    // Below 2^-6 codes are multiples of 2^-9; above, 3 bits of mantissa stay of 23 and the
    // exponent's bias is 7 instead of 127. Both round to nearest even.
    unsigned int code = size < 0x3c800000
        ? __float_as_uint(__fadd_rn(fabsf(v) * 512.f, 8388608.f)) & 0xff
        : ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3);
    both |= (code | (bits >> 24 & 0x80)) << 8 * i;
  }
  return both;
#endif
}

// A pair of values times `inverse`. What is not a number becomes 0, as does an `unusable` row.
__device__ unsigned int quantize(unsigned int pair, float inverse, bool unusable) {
  float low = multiply(value(pair & 0xffff), inverse);
  float high = multiply(value(pair >> 16), inverse);
  low = unusable || low != low ? 0.f : fminf(fmaxf(low, -QMAX), QMAX);
  high = unusable || high != high ? 0.f : fminf(fmaxf(high, -QMAX), QMAX);
  return encode(low, high);
}

extern "C" __global__ void quant_expand(const unsigned short* x, unsigned int* q, float* scale,
                                        long long stride, int k, int n, int odd_start, int odd_end,
                                        int end, bool staged, bool aligned) {
  extern __shared__ uint4 row_in_shared[];
  __shared__ unsigned int partial[32];
  const int pairs = (k + 1) / 2;
  const long long row = blockIdx.x;
  x += row * stride;
  q += row * (end / 4);

  auto from_memory = [&](int pair) {
    unsigned int low = x[2 * pair];
    return low | (2 * pair + 1 < k ? (unsigned int)x[2 * pair + 1] << 16 : 0);
  };
  unsigned int* words = reinterpret_cast<unsigned int*>(row_in_shared);
  unsigned int found = 0;  // the bits of the largest |x|; they order like the values
  auto look = [&](unsigned int pair) {
    found = max(found, max(pair & 0x7fff, pair >> 16 & 0x7fff));
  };
  const int vectors = staged && aligned ? k / 8 : 0;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    uint4 four = reinterpret_cast<const uint4*>(x)[i];
    look(four.x), look(four.y), look(four.z), look(four.w);
    row_in_shared[i] = four;
  }
  for (int i = vectors * 4 + threadIdx.x; i < pairs; i += blockDim.x) {
    unsigned int pair = from_memory(i);
    look(pair);
    if (staged) words[i] = pair;
  }
  found = __reduce_max_sync(0xffffffff, found);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = found;
  __syncthreads();
  found = threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32] : 0;
  found = __reduce_max_sync(0xffffffff, found);

  const float amax = value(found);
  const bool finite = __float_as_uint(amax) < 0x7f800000;
  const bool unusable = !finite || found == 0;
  const float inverse = unusable ? 0.f : divide(QMAX, amax);
  if (threadIdx.x == 0) scale[row] = finite ? divide(amax, QMAX) : __uint_as_float(0x7fc00000);

  for (int i = threadIdx.x; i < end / 4; i += blockDim.x) {
    const int odd = i * 4 >= odd_start;                 // which section
    const int windows = odd ? (n - 1) / 2 : n / 2;      // of a group in this section
    const int place = odd ? i - odd_start / 4 : i;
    unsigned int word = 0;
    if (i * 4 < odd_end) {
      const int group = place / windows;
      const int first = group * n + 2 * (place - group * windows) + odd;
      for (int j = 0; j < 2; ++j) {
        unsigned int pair = 0;
        if (first + j < pairs) pair = staged ? words[first + j] : from_memory(first + j);
        word |= quantize(pair, inverse, unusable) << 16 * j;
      }
    }
    q[i] = word;
  }
}
"""

KERNELS = {
    (x, q): cupy.RawKernel(
        SOURCE,
        "quant_expand",
        options=(
            "--std=c++17",
            f"-DBF16={int(x == torch.bfloat16)}",
            f"-DINT8={int(q == torch.int8)}",
        ),
    )
    for x in (torch.bfloat16, torch.float16)
    for q in (torch.int8, torch.float8_e4m3fn)
}


def run(
    x: torch.Tensor, pattern: str | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], unit inner stride; returns q [M, K'] and scale [M]."""
    q, scale = empty_output(x, pattern, dtype)
    (rows, k), end = x.shape, q.shape[1]
    form = sparsity.pattern(pattern) if pattern else sparsity.Pattern(2)
    odd_start = form.odd_start(k)
    odd_end = odd_start + -(-form.groups(k) * form.odd // 16) * 16
    stride = x.stride(0) if rows > 1 else k
    staged = 2 * k <= STAGED_BYTES
    # About eight values per thread and iteration, in whole warps.
    threads = min(1024, max(32, -(-k // 256) * 32))
    stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream(x.device))
    with cupy.cuda.Device(x.device.index), stream:
        KERNELS[x.dtype, dtype](
            (rows,),
            (threads,),
            (
                numpy.uintp(x.data_ptr()),
                numpy.uintp(q.data_ptr()),
                numpy.uintp(scale.data_ptr()),
                numpy.int64(stride),
                *(numpy.int32(number) for number in (k, form.n, odd_start, odd_end, end)),
                numpy.bool_(staged),
                numpy.bool_(x.data_ptr() % 16 == 0 and stride % 8 == 0),
            ),
            shared_mem=-(-k // 8) * 16 if staged else 0,
        )
    return q, scale
