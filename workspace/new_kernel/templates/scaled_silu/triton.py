# SPDX-License-Identifier: Apache-2.0
# pyrefly: ignore-errors[implicit-any-parameter, unannotated-return, unbound-name]
# Triton's compiler types a kernel's arguments, and takes or drops a branch on a constexpr.
"""y = silu(x) * scale in Triton: a program per row and BLOCK columns.

x [M, K], scale [K], y [M, K], all bfloat16 or all float16; computed in float32.
"""

import torch
import triton
import triton.language as tl

from custom_kernels.operation import Specialization

DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def scaled_silu(x, scale, y, K, BLOCK: tl.constexpr):
    """One row (64-bit offsets: M times K may be large), BLOCK columns of it."""
    row = tl.program_id(0).to(tl.int64) * K
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    value = tl.load(x + row + columns, mask=inside, other=0).to(tl.float32)
    factor = tl.load(scale + columns, mask=inside, other=0).to(tl.float32)
    result = value / (1 + tl.exp(-value)) * factor
    tl.store(y + row + columns, result.to(y.dtype.element_ty), mask=inside)


def block(k: int) -> int:
    """Columns of a program."""
    return min(1024, triton.next_power_of_2(k))


def run(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Asynchronous on the current stream; the first call with a new block size compiles."""
    m, k = x.shape
    y = torch.empty_like(x)
    scaled_silu[(m, triton.cdiv(k, block(k)))](x, scale, y, k, BLOCK=block(k))
    return y


def specializations() -> list[Specialization]:
    """What a launch for a wide row compiles."""
    signature = {"x": "*bf16", "scale": "*bf16", "y": "*bf16", "K": "i32"}
    constants = {"BLOCK": block(18944)}
    aligned = ("x", "scale", "y", "K")
    return [Specialization(scaled_silu, signature, constants, label="bfloat16", aligned=aligned)]
