# SPDX-License-Identifier: Apache-2.0
"""y = x · Wᵀ + b as a CuPy RawKernel on tensor cores through WMMA: a block per 32 x 32 tile of y, a
warp per 16 x 16.

x [M, K], W [N, K], b [N] or none, y [M, N], all bfloat16 or all float16; sums in float32.
"""

import cupy
import torch

from custom_kernels import nvrtc

DTYPES = (torch.bfloat16, torch.float16)
TILE = 32
THREADS = 128

SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

using int64_t = long long;
constexpr int kTile = TILE, kThreads = THREADS;

extern "C" __global__ void __launch_bounds__(kThreads)
gemm(const T* x, const T* w, const T* bias, T* y, int64_t m, int64_t n, int64_t k,
     int64_t x_stride, int64_t w_stride) {
  using namespace nvcuda;
  __shared__ alignas(32) T x_tile[kTile][kTile + 8], w_tile[kTile][kTile + 8];
  __shared__ alignas(32) float sums[kTile][kTile + 4];
  int64_t row = int64_t{blockIdx.y} * kTile, column = int64_t{blockIdx.x} * kTile;
  int warp = threadIdx.x / 32, warp_row = warp / 2 * 16, warp_column = warp % 2 * 16;

  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
  wmma::fill_fragment(sum, 0.f);
  for (int64_t start = 0; start < k; start += kTile) {
    // Zeros beyond the edges: they add nothing. Unrolled further, it runs out of registers.
#pragma unroll 2
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      int64_t r = i / kTile, c = i % kTile;
      bool inside = start + c < k;
      x_tile[r][c] = inside && row + r < m ? x[(row + r) * x_stride + start + c] : T(0.f);
      w_tile[r][c] = inside && column + r < n ? w[(column + r) * w_stride + start + c] : T(0.f);
    }
    __syncthreads();
    for (int step = 0; step < kTile; step += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> a;
      wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> b;
      wmma::load_matrix_sync(a, &x_tile[warp_row][step], kTile + 8);
      wmma::load_matrix_sync(b, &w_tile[warp_column][step], kTile + 8);
      wmma::mma_sync(sum, a, b, sum);
    }
    __syncthreads();
  }
  wmma::store_matrix_sync(&sums[warp_row][warp_column], sum, kTile + 4, wmma::mem_row_major);
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    int64_t r = row + i / kTile, c = column + i % kTile;
    if (r < m && c < n)
      y[r * n + c] = T(sums[i / kTile][i % kTile] + (bias ? float(bias[c]) : 0.f));
  }
}
"""

KERNELS = {
    dtype: cupy.RawKernel(
        SOURCE,
        "gemm",
        options=(
            f"-DT={name}",
            f"-DTILE={TILE}",
            f"-DTHREADS={THREADS}",
            "-std=c++17",
            *nvrtc.include_options(),
        ),
    )
    for dtype, name in ((torch.bfloat16, "__nv_bfloat16"), (torch.float16, "__half"))
}


def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Asynchronous on the current stream; the first call per dtype compiles."""
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty((m, n))
    stream = torch.cuda.current_stream(x.device).cuda_stream
    with cupy.cuda.Device(x.device.index), cupy.cuda.ExternalStream(stream):
        pointers = [x, weight, bias, y]
        KERNELS[x.dtype](
            (-(-n // TILE), -(-m // TILE)),
            (THREADS,),
            (
                *(0 if tensor is None else tensor.data_ptr() for tensor in pointers),
                *(m, n, k, x.stride(0), weight.stride(0)),
            ),
        )
    return y
