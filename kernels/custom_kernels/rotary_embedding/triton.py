# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding of queries and keys in Triton.

    query [M, heads · D] and key, which may be none, bfloat16, float16 or float32, unit inner
    stride, any row stride; positions [M] int64; cache [P, R] of that dtype or float32. Pair (a, b)
    of a head becomes (a · cos - b · sin, b · cos + a · sin), in float32, rounded once.

A program has a token: its angles, and a tile of heads by pairs after the other.
"""

import functools

import torch
import triton
import triton.language as tl
from triton import knobs

from custom_kernels.operation import Specialization
from custom_kernels.rotary_embedding import empty_output

PAIRS = 2048
"""Of a tile."""

INTERPRETED = knobs.runtime.interpret
"""Triton's interpreter truncates to bfloat16: there outputs are float32, which torch rounds."""


@triton.jit
def rotate(
    x, y, cos, sin, HEADS, D: tl.constexpr, HALF: tl.constexpr, NEOX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """All heads of a token, ROWS at a time."""
    pair = tl.arange(0, BLOCK)[None, :]
    for start in range(0, HEADS, ROWS):
        head = start + tl.arange(0, ROWS)[:, None]
        inside = (head < HEADS) & (pair < HALF)
        first = head * D + (pair if NEOX else 2 * pair)
        second = first + (HALF if NEOX else 1)
        a = tl.load(x + first, mask=inside, other=0).to(tl.float32)
        b = tl.load(x + second, mask=inside, other=0).to(tl.float32)
        tl.store(y + first, (a * cos - b * sin).to(y.dtype.element_ty), mask=inside)
        tl.store(y + second, (b * cos + a * sin).to(y.dtype.element_ty), mask=inside)
        if REST > 0:
            place = 2 * HALF + tl.arange(0, REST)[None, :]
            inside = (head < HEADS) & (place < D)
            kept = tl.load(x + head * D + place, mask=inside, other=0)
            tl.store(y + head * D + place, kept.to(y.dtype.element_ty), mask=inside)


@triton.jit
def rotate_rows(
    query, key, positions, cache, rotated, rotated_key, HEADS, KV_HEADS, query_stride, key_stride,
    D: tl.constexpr, HALF: tl.constexpr, NEOX: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    angles = cache + tl.load(positions + row) * (2 * HALF)
    pair = tl.arange(0, BLOCK)[None, :]
    cos = tl.load(angles + pair, mask=pair < HALF, other=0).to(tl.float32)
    sin = tl.load(angles + HALF + pair, mask=pair < HALF, other=0).to(tl.float32)
    # fmt: off
    rotate(query + row * query_stride, rotated + row * HEADS * D, cos, sin, HEADS,
           D, HALF, NEOX, ROWS, BLOCK, REST)
    if key is not None:
        rotate(key + row * key_stride, rotated_key + row * KV_HEADS * D, cos, sin, KV_HEADS,
               D, HALF, NEOX, ROWS, BLOCK, REST)
    # fmt: on


@functools.lru_cache(maxsize=4096)
def plan(heads: int, head_size: int, rotary: int, is_neox: bool) -> dict[str, int | bool]:
    """The constants."""
    block = triton.next_power_of_2(rotary // 2)
    rest = head_size - rotary
    return {
        "D": head_size,
        "HALF": rotary // 2,
        "NEOX": is_neox,
        "ROWS": max(1, min(triton.next_power_of_2(heads), PAIRS // block)),
        "BLOCK": block,
        "REST": triton.next_power_of_2(rest) if rest else 0,
    }


def run(
    query: torch.Tensor,
    key: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    is_neox: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query and key [M, heads · head_size], unit inner stride; returns both, the key empty without
    one."""
    rotated, rotated_key = empty_output(query, key, positions, cos_sin_cache, head_size, is_neox)
    if INTERPRETED:
        rotated, rotated_key = rotated.float(), rotated_key.float()
    rows = query.shape[0]
    heads = query.shape[1] // head_size
    with torch.cuda.device_of(query):
        rotate_rows[(rows,)](
            query,
            key,
            positions,
            cos_sin_cache,
            rotated,
            None if key is None else rotated_key,
            heads,
            0 if key is None else key.shape[1] // head_size,
            query.stride(0),
            0 if key is None else key.stride(0),
            **plan(heads, head_size, cos_sin_cache.shape[1], is_neox),
        )
    return rotated.to(query.dtype), rotated_key.to(query.dtype)


def specializations() -> list[Specialization]:
    """28 heads of 128 values and 4 of the key, both ways to make pairs."""
    pointers = {"query": "*bf16", "key": "*bf16", "positions": "*i64", "cache": "*bf16",
                "rotated": "*bf16", "rotated_key": "*bf16"}  # fmt: skip
    numbers = ("HEADS", "KV_HEADS", "query_stride", "key_stride")
    return [
        Specialization(
            rotate_rows,
            {**pointers, **dict.fromkeys(numbers, "i32")},
            dict(plan(28, 128, 128, is_neox)),
            label="halves" if is_neox else "neighbours",
            aligned=(*pointers, "query_stride", "key_stride"),
        )
        for is_neox in (True, False)
    ]
