# SPDX-License-Identifier: Apache-2.0
# pyrefly: ignore-errors[implicit-any-parameter, unannotated-return, unbound-name]
# Triton's compiler types a kernel's arguments, and takes or drops a branch on a constexpr.
"""y = x · Wᵀ + b in Triton: a program per tile of y.

x [M, K], W [N, K], b [N] or none, y [M, N], all bfloat16 or all float16; sums in float32.
"""

import torch
import triton
import triton.language as tl
from triton import knobs

from custom_kernels.operation import Specialization

DTYPES = (torch.bfloat16, torch.float16)

INTERPRETED = knobs.runtime.interpret
"""The interpreter neither multiplies bfloat16 nor rounds to it: there tiles become float32, and
torch rounds the result."""

CONSTANTS = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "WIDEN": INTERPRETED}


@triton.jit
def gemm(
    x,
    w,
    bias,
    y,
    M,
    N,
    K,
    x_stride,
    w_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The tile of y at (program_id(0), program_id(1)); 64-bit offsets between rows."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    w_rows = w + columns.to(tl.int64)[:, None] * w_stride
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x_rows + k, mask=(rows < M)[:, None] & (k < K), other=0)
        w_tile = tl.load(w_rows + k, mask=(columns < N)[:, None] & (k < K), other=0)
        if WIDEN:
            x_tile = x_tile.to(tl.float32)
            w_tile = w_tile.to(tl.float32)
        sums = tl.dot(x_tile, w_tile.T, sums)
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=columns < N, other=0).to(tl.float32)
    places = y + rows.to(tl.int64)[:, None] * N + columns
    inside = (rows < M)[:, None] & (columns < N)
    tl.store(places, sums.to(y.dtype.element_ty), mask=inside)


def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Asynchronous on the current stream; the first call compiles."""
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty((m, n), dtype=torch.float32 if INTERPRETED else x.dtype)
    grid = (triton.cdiv(m, CONSTANTS["BLOCK_M"]), triton.cdiv(n, CONSTANTS["BLOCK_N"]))
    strides = (x.stride(0), weight.stride(0))
    gemm[grid](x, weight, bias, y, m, n, k, *strides, HAS_BIAS=bias is not None, **CONSTANTS)
    return y.to(x.dtype)


def specializations() -> list[Specialization]:
    """What a launch for a layer of a model compiles."""
    signature = {
        **dict.fromkeys(("x", "w", "bias", "y"), "*bf16"),
        **dict.fromkeys(("M", "N", "K", "x_stride", "w_stride"), "i32"),
    }
    constants = {"HAS_BIAS": True, **CONSTANTS}
    aligned = tuple(signature)
    return [Specialization(gemm, signature, constants, label="bfloat16", aligned=aligned)]
