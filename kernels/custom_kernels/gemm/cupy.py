# SPDX-License-Identifier: Apache-2.0
"""y = x · Wᵀ + b as one CuPy RawKernel on tensor cores, to read and to change.

    x [M, K], W [N, K], b [N] or none, y [M, N], all bfloat16 or all float16; sums in float32,
    rounded once.

How it works, as in any textbook on tiled matrix products:

- a block of 8 warps computes a tile of BM by BN of y;
- it walks along K in steps of BK. A step's tiles of x and W are copied to shared memory, and while
  the tensor cores multiply one pair of tiles, the next pair is on its way (``cp.async``, two
  buffers);
- each warp holds its part of the tile as WMMA fragments of 16 by 16, in registers;
- at the end the fragments go through shared memory, which knows their layout where the registers'
  is not documented, get the bias, and are rounded and written.

Edges: what lies outside of x and W is copied as zeros, what lies outside of y is not written.
Rows that do not start at multiples of 16 bytes are copied element by element.

Where to start changing it: BM, BN, BK and the layout of the warps in ``TILES``; the number of
buffers; a swizzle instead of PADDING; ``mma`` or ``wgmma`` instead of WMMA; a split of K, without
which a few tokens leave most of the chip idle.
"""

from typing import Any

import cupy
import torch

from custom_kernels import nvrtc

DTYPES = (torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)
"""WMMA for bfloat16 and ``cp.async`` need it."""

SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

// The options say what these are: T (the element), BM, BN, BK (the tile), WARPS_M, WARPS_N (how the
// warps share it).
using namespace nvcuda::wmma;

constexpr int THREADS = WARPS_M * WARPS_N * 32;
constexpr int FRAGMENTS_M = BM / WARPS_M / 16;  // of 16 by 16, per warp
constexpr int FRAGMENTS_N = BN / WARPS_N / 16;
constexpr int PADDING = 8;                      // so that rows start in different banks
constexpr int ROW = BK + PADDING;               // elements per row of a tile in shared memory
constexpr int BUFFER = (BM + BN) * ROW;         // elements per buffer: x's tile, then W's

// Copies rows [first_row, first_row + ROWS) and columns [k0, k0 + BK) of a matrix to shared memory,
// 8 elements (16 bytes) per thread and turn. Zeros where the matrix ends.
template <int ROWS>
__device__ void copy_tile(T* tile, const T* matrix, long long first_row, long long rows,
                          long long k0, long long k, long long stride, bool aligned) {
  for (int i = threadIdx.x; i < ROWS * BK / 8; i += THREADS) {
    const int row = i / (BK / 8), column = i % (BK / 8) * 8;
    T* to = tile + row * ROW + column;
    const bool inside = first_row + row < rows;
    const T* from = matrix + (inside ? (first_row + row) * stride : 0);
    if (aligned) {
      const bool all = inside && k0 + column < k;
      const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address),
                   "l"(all ? from + k0 + column : matrix), "r"(all ? 16 : 0));
    } else {
      for (int j = 0; j < 8; ++j)
        to[j] = inside && k0 + column + j < k ? from[k0 + column + j] : T(0.f);
    }
  }
}

__device__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

extern "C" __global__ void __launch_bounds__(THREADS)
gemm(const T* x, const T* w, const T* bias, T* y, long long m, long long n, long long k,
     long long x_stride, long long w_stride, bool aligned) {
  extern __shared__ __align__(128) unsigned char memory[];
  T* buffers = reinterpret_cast<T*>(memory);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp / WARPS_N * FRAGMENTS_M * 16;  // where this warp works
  const int warp_n = warp % WARPS_N * FRAGMENTS_N * 16;
  const long long tiles_m = (m + BM - 1) / BM;
  // Blocks that run at the same time share a tile of W, the larger matrix.
  const long long m0 = blockIdx.x % tiles_m * BM, n0 = blockIdx.x / tiles_m * BN;

  // Every loop over fragments is unrolled: registers have no index that is known at run time only.
  fragment<accumulator, 16, 16, 16, float> sums[FRAGMENTS_M][FRAGMENTS_N];
#pragma unroll
  for (int i = 0; i < FRAGMENTS_M; ++i)
#pragma unroll
    for (int j = 0; j < FRAGMENTS_N; ++j) fill_fragment(sums[i][j], 0.f);

  const auto copy_step = [&](long long step) {
    T* buffer = buffers + step % 2 * BUFFER;
    copy_tile<BM>(buffer, x, m0, m, step * BK, k, x_stride, aligned);
    copy_tile<BN>(buffer + BM * ROW, w, n0, n, step * BK, k, w_stride, aligned);
  };

  const long long steps = (k + BK - 1) / BK;
  copy_step(0);
  for (long long step = 0; step < steps; ++step) {
    wait_for_copies();
    __syncthreads();  // this step's tiles are there, and nobody reads the other buffer any more
    if (step + 1 < steps) copy_step(step + 1);

    const T* x_tile = buffers + step % 2 * BUFFER;
    const T* w_tile = x_tile + BM * ROW;
#pragma unroll
    for (int kk = 0; kk < BK; kk += 16) {
      fragment<matrix_a, 16, 16, 16, T, row_major> a[FRAGMENTS_M];
      fragment<matrix_b, 16, 16, 16, T, col_major> b[FRAGMENTS_N];  // W's rows are Wᵀ's columns
#pragma unroll
      for (int i = 0; i < FRAGMENTS_M; ++i)
        load_matrix_sync(a[i], x_tile + (warp_m + i * 16) * ROW + kk, ROW);
#pragma unroll
      for (int j = 0; j < FRAGMENTS_N; ++j)
        load_matrix_sync(b[j], w_tile + (warp_n + j * 16) * ROW + kk, ROW);
#pragma unroll
      for (int i = 0; i < FRAGMENTS_M; ++i)
#pragma unroll
        for (int j = 0; j < FRAGMENTS_N; ++j) mma_sync(sums[i][j], a[i], b[j], sums[i][j]);
    }
  }
  __syncthreads();  // the buffers' memory is used again

  float* patch = reinterpret_cast<float*>(memory) + warp * 16 * 16;  // of this warp alone
#pragma unroll
  for (int i = 0; i < FRAGMENTS_M; ++i)
#pragma unroll
    for (int j = 0; j < FRAGMENTS_N; ++j) {
      store_matrix_sync(patch, sums[i][j], 16, mem_row_major);
      __syncwarp();
      for (int e = lane; e < 16 * 16; e += 32) {
        const long long row = m0 + warp_m + i * 16 + e / 16, column = n0 + warp_n + j * 16 + e % 16;
        if (row < m && column < n)
          y[row * n + column] = T(patch[e] + (bias ? float(bias[column]) : 0.f));
      }
      __syncwarp();
    }
}
"""

TILES = {"many tokens": (128, 128, 32, 2, 4), "few tokens": (32, 64, 128, 2, 4)}
"""BM, BN, BK, and how many warps share a tile along M and along N."""

_ELEMENTS = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}


def _kernel(dtype: torch.dtype, tile: tuple[int, ...]) -> cupy.RawKernel:
    names = ("BM", "BN", "BK", "WARPS_M", "WARPS_N")
    sizes = [f"-D{name}={size}" for name, size in zip(names, tile, strict=True)]
    options = ("--std=c++17", f"-DT={_ELEMENTS[dtype]}", *sizes, *nvrtc.include_options())
    return cupy.RawKernel(SOURCE, "gemm", options=options)


# Compiled at the first launch, and kept in CuPy's cache folder.
KERNELS = {(dtype, name): _kernel(dtype, tile) for dtype in DTYPES for name, tile in TILES.items()}


def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K], weight [N, K], bias [N] or None, all bfloat16 or all float16; returns [M, N] of
    that dtype. Deterministic.

    Asynchronous on torch's current stream. The first call for a dtype compiles.
    """
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty((m, n))
    name = "few tokens" if m <= 64 else "many tokens"
    bm, bn, bk, warps_m, warps_n = TILES[name]
    kernel = KERNELS[x.dtype, name]
    buffers = 2 * (bm + bn) * (bk + 8) * 2
    patches = warps_m * warps_n * 16 * 16 * 4
    shared = max(buffers, patches)
    aligned = k % 8 == 0 and all(_rows_aligned(matrix) for matrix in (x, weight))
    with cupy.cuda.Device(x.device.index), _current_stream(x.device):
        if shared > 48 << 10:
            kernel.max_dynamic_shared_size_bytes = shared
        kernel(
            (-(-m // bm) * -(-n // bn),),
            (32 * warps_m * warps_n,),
            (
                x.data_ptr(),
                weight.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                y.data_ptr(),
                *(m, n, k, x.stride(0), weight.stride(0)),
                aligned,
            ),
            shared_mem=shared,
        )
    return y


def _rows_aligned(matrix: torch.Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    apart = matrix.stride(0) if matrix.shape[0] > 1 else 0
    return (matrix.data_ptr() | apart * matrix.element_size()) % 16 == 0


def _current_stream(device: torch.device) -> Any:
    return cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream)
