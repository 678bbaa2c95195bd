# SPDX-License-Identifier: Apache-2.0
"""y = silu(gate) · up in Triton.

    x [M, 2K] bfloat16, float16 or float32, unit inner stride: gate is its first half, up its
    second; y [M, K]. y = round(round(gate / (1 + exp(-gate))) · up), in float32.

A program has a part of a row, or several short rows.
"""

import functools

import torch
import triton
import triton.language as tl
from triton import knobs

from custom_kernels.operation import Specialization
from custom_kernels.silu_and_mul import empty_output

VALUES = 2048
"""Of a program."""

INTERPRETED = knobs.runtime.interpret
"""Triton's interpreter truncates to bfloat16: there the output is float32, which torch rounds."""


# M changes from call to call: being 1 or a multiple of 16 must not make a kernel of its own.
@triton.jit(do_not_specialize=["M"])
def silu_rows(x, y, M, K, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS rows, BLOCK values of each."""
    blocks = tl.cdiv(K, BLOCK)
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    k = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < M) & (k < K)
    gate = tl.load(x + row * x_stride + k, mask=inside, other=0).to(tl.float32)
    up = tl.load(x + row * x_stride + K + k, mask=inside, other=0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * K + k, (activated * up).to(y.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=4096)
def plan(k: int) -> dict[str, int]:
    """The constants for rows of ``k`` values of y."""
    block = min(triton.next_power_of_2(k), VALUES)
    return {"ROWS": VALUES // block, "BLOCK": block}


def run(x: torch.Tensor) -> torch.Tensor:
    """x [M, 2K], unit inner stride; returns y [M, K]."""
    y = empty_output(x)
    if INTERPRETED:
        y = y.float()
    rows, k = y.shape
    constants = plan(k)
    programs = triton.cdiv(rows, constants["ROWS"]) * triton.cdiv(k, constants["BLOCK"])
    with torch.cuda.device_of(x):
        silu_rows[(programs,)](x, y, rows, k, x.stride(0) if rows > 1 else 2 * k, **constants)
    return y.to(x.dtype)


def specializations() -> list[Specialization]:
    """A row of 18944 values, and a short one."""
    signature = {"x": "*bf16", "y": "*bf16", "M": "i32", "K": "i32", "x_stride": "i32"}
    aligned = ("x", "y", "K", "x_stride")
    return [
        Specialization(silu_rows, signature, dict(plan(k)), label=f"K={k}", aligned=aligned)
        for k in (18944, 256)
    ]
