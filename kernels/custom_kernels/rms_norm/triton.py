# SPDX-License-Identifier: Apache-2.0
"""y, total = RMS norm of x + residual, and the sum, in Triton.

    x, residual [M, K] bfloat16, float16 or float32, unit inner stride, residual or none; weight [K]
    of that dtype or float32, or none; y, total [M, K] of x's dtype. Per row, in float32:
    v = x + residual, total = round(v), y = round(round(v / sqrt(mean(v²) + epsilon)) · weight).

A program has a row, or several short ones, and keeps it in registers between the sum of squares and
the product; a row too long for that is read twice.
"""

import dataclasses
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

from custom_kernels.operation import Specialization
from custom_kernels.rms_norm import empty_output

ON_CHIP = 16384
"""Values of a row that are kept in registers."""
SHORT = 1024
"""Values that a program has at least, in several rows if need be."""

INTERPRETED = knobs.runtime.interpret
"""Triton's interpreter truncates to bfloat16: there outputs are float32, which torch rounds."""


@triton.jit
def load_sum(x, residual, row, k, inside, x_stride, residual_stride):
    """x + residual in float32, zeros outside."""
    v = tl.load(x + row * x_stride + k, mask=inside, other=0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + row * residual_stride + k, mask=inside, other=0).to(tl.float32)
    return v


@triton.jit
def store_normalized(y, weight, v, factor, row, k, inside, K):
    """y = round(v · factor) · weight, rounded to the weight's dtype between."""
    values = v * factor
    if weight is not None:
        gain = tl.load(weight + k, mask=k < K, other=0)
        if gain.dtype != tl.float32:
            values = values.to(y.dtype.element_ty).to(tl.float32)
        values *= gain.to(tl.float32)
    tl.store(y + row * K + k, values.to(y.dtype.element_ty), mask=inside)


# M changes from call to call: being 1 or a multiple of 16 must not make a kernel of its own.
@triton.jit(do_not_specialize=["M"])
def norm_rows(
    x,
    residual,
    weight,
    y,
    total,
    M,
    K,
    x_stride,
    residual_stride,
    epsilon,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """ROWS rows at a time, BLOCK values of each: WHOLE rows, or one after the other."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        inside = (row < M) & (columns < K)
        v = load_sum(x, residual, row, columns, inside, x_stride, residual_stride)
        if residual is not None:
            tl.store(total + row * K + columns, v.to(total.dtype.element_ty), mask=inside)
        factor = tl.rsqrt(tl.sum(v * v, 1, keep_dims=True) / K + epsilon)
        store_normalized(y, weight, v, factor, row, columns, inside, K)
    else:
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, K, BLOCK):
            k = start + columns
            inside = (row < M) & (k < K)
            v = load_sum(x, residual, row, k, inside, x_stride, residual_stride)
            if residual is not None:
                tl.store(total + row * K + k, v.to(total.dtype.element_ty), mask=inside)
            squares += v * v
        factor = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / K + epsilon)
        for start in range(0, K, BLOCK):
            k = start + columns
            inside = (row < M) & (k < K)
            v = load_sum(x, residual, row, k, inside, x_stride, residual_stride)
            store_normalized(y, weight, v, factor, row, k, inside, K)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The settings for rows of some length."""

    rows: int
    constants: dict[str, Any]
    num_warps: int


@functools.lru_cache(maxsize=4096)
def plan(k: int) -> Plan:
    """The settings for rows of ``k`` values."""
    block = min(triton.next_power_of_2(k), ON_CHIP)
    rows = max(1, SHORT // block)
    return Plan(
        rows,
        {"ROWS": rows, "BLOCK": block, "WHOLE": k <= block},
        num_warps=min(16, max(4, block // 1024)),
    )


def run(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual [M, K], unit inner stride, weight [K]; returns y [M, K] and the new residual,
    empty without one."""
    y, total = empty_output(x, residual, weight, epsilon)
    if INTERPRETED:
        y, total = y.float(), total.float()
    rows, k = x.shape
    launch = plan(k)
    with torch.cuda.device_of(x):
        norm_rows[(triton.cdiv(rows, launch.rows),)](
            x,
            residual,
            weight,
            y,
            None if residual is None else total,
            rows,
            k,
            x.stride(0) if rows > 1 else k,
            residual.stride(0) if residual is not None and rows > 1 else k,
            epsilon,
            **launch.constants,
            num_warps=launch.num_warps,
        )
    return y.to(x.dtype), total.to(x.dtype)


def specializations() -> list[Specialization]:
    """A row of 3584 values, with and without a residual, a short and a long one."""
    found = []
    for k, residual in ((3584, True), (3584, False), (128, False), (65536, True)):
        launch = plan(k)
        signature = {"x": "*bf16", "residual": "*bf16", "weight": "*bf16", "y": "*bf16",
                     "total": "*bf16", "M": "i32", "K": "i32", "x_stride": "i32",
                     "residual_stride": "i32", "epsilon": "fp32"}  # fmt: skip
        constants = dict(launch.constants)
        if not residual:
            for name in ("residual", "total"):
                del signature[name]
                constants[name] = None
        found.append(
            Specialization(
                norm_rows,
                signature,
                constants,
                num_warps=launch.num_warps,
                label=f"K={k}" + (", residual" if residual else ""),
                aligned=tuple(name for name in signature if name not in ("M", "epsilon")),
            )
        )
    return found
