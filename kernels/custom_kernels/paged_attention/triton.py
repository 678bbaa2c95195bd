# SPDX-License-Identifier: Apache-2.0
"""Attention of one query per sequence to a paged cache in Triton: one kernel for a part of a
sequence, and one that adds the parts.

    query [B, Hq, D], key_pages and value_pages [P, page, Hkv, D] with unit inner stride, bfloat16,
    float16 or float32; block_table [B, W] and lengths [B] int32; y [B, Hq, D].
    y = sum over t of softmax(scale · q · k[t]) · v[t], in float32, rounded once.

The work is memory traffic: each key and value is read once. So a program has all query heads that
share a key head, as rows of one product on the tensor cores, and reads BLOCK tokens at a time; the
softmax is kept as a running maximum, the sum of powers below it, and the weighted sum of values.

A few long sequences would leave most of a GPU idle: a sequence is split into equal parts, whose
three results the second kernel adds in a fixed order. How many parts there are depends on shapes
alone and never on lengths, which only the device knows: a CUDA graph can hold the launch.

The running softmax is that of Milakov and Gimelshein, Online normalizer calculation for softmax,
2018; the split is known as Flash-Decoding (Dao et al., 2023).
"""

import functools

import torch
import triton
import triton.language as tl
from triton import knobs

from custom_kernels.operation import Specialization
from custom_kernels.paged_attention import empty_output

MIN_CAPABILITY = (8, 0)
"""Its products of bfloat16 need it."""

PROGRAMS = 4
"""Wanted per multiprocessor. An H200's holds 5 of them with the tiles below: were it fewer, a
second wave would leave most of the GPU idle."""
PARTS = 64
"""Of a sequence, at most."""
PART = 64
"""Tokens of the longest possible sequence for which another part is worth its second pass."""
TILE = 8192
"""Bytes of a tile of keys, at most."""
WARPS = 4
STAGES = 5
"""The fewest with which a tile is on its way while another is multiplied: the numbers of its pages
have to come first."""
LOG2_E = 1.4426950408889634
"""exp(x) is exp2(x · LOG2_E)."""
SHAPE = ("D", "COLUMNS")
"""The constants that both kernels have."""

INTERPRETED = knobs.runtime.interpret
"""Triton's interpreter multiplies bfloat16 as integers, and truncates to it: there tiles become
float32 before they are multiplied, and torch rounds the result."""


@triton.jit(do_not_specialize_on_alignment=["parts"])
def attend(
    query, key_pages, value_pages, block_table, lengths, y, sums, maxima, totals, scale, PAGE,
    query_stride, head_stride, key_page, key_token, key_head, value_page, value_token, value_head,
    table_stride, parts, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One part of one sequence for the GROUP query heads of a key head. ``scale`` is that of powers
    of two. With one part y is written, else sums [B, Hq, parts, D], maxima and totals
    [B, Hq, parts]."""
    sequence = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    kv_head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    part = tl.program_id(1)
    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row
    d = tl.arange(0, COLUMNS)
    length = tl.load(lengths + sequence)
    tiles = tl.cdiv(length, BLOCK)
    first = tiles * part // parts * BLOCK
    last = tl.minimum(tiles * (part + 1) // parts * BLOCK, length)

    inside = (row < GROUP)[:, None] & (d < D)[None, :]
    places = query + sequence * query_stride + head[:, None] * head_stride + d[None, :]
    q = tl.load(places, mask=inside, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        held = token < last
        table = block_table + sequence * table_stride + token // PAGE
        page = tl.load(table, mask=held, other=0).to(tl.int64)
        place = token % PAGE
        loaded = held[:, None] & (d < D)[None, :]
        keys = key_pages + kv_head * key_head + page * key_page + place * key_token
        k = tl.load(keys[:, None] + d[None, :], mask=loaded, other=0.0)
        values = value_pages + kv_head * value_head + page * value_page + place * value_token
        v = tl.load(values[:, None] + d[None, :], mask=loaded, other=0.0)
        if WIDEN:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, k.T, input_precision="ieee") * scale
        scores = tl.where(held[None, :], scores, float("-inf"))
        # Every tile has a token, so from here on the maximum is finite.
        higher = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        total = total * shrink + tl.sum(weights, 1)
        weighted = weighted * shrink[:, None]
        weighted = tl.dot(weights.to(v.dtype), v, weighted, input_precision="ieee")
        maximum = higher

    row_of = (sequence * KV_HEADS * GROUP + head) * parts + part
    if parts == 1:
        result = weighted / tl.where(total > 0, total, 1.0)[:, None]
        to = y + row_of[:, None] * D + d[None, :]
        tl.store(to, result.to(y.dtype.element_ty), mask=inside)
    else:
        tl.store(sums + row_of[:, None] * D + d[None, :], weighted, mask=inside)
        tl.store(maxima + row_of, maximum, mask=row < GROUP)
        tl.store(totals + row_of, total, mask=row < GROUP)


@triton.jit(do_not_specialize_on_alignment=["parts"])
def add_parts(
    sums, maxima, totals, y, parts, D: tl.constexpr, COLUMNS: tl.constexpr, ROOM: tl.constexpr
):  # fmt: skip
    """y of one query head of one sequence; a part without a token has the maximum -inf. ROOM is for
    the parts."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, ROOM)
    d = tl.arange(0, COLUMNS)
    there = part < parts
    maximum = tl.load(maxima + head * parts + part, mask=there, other=float("-inf"))
    highest = tl.max(maximum, 0)
    shrink = tl.where(maximum > float("-inf"), tl.exp2(maximum - highest), 0.0)
    total = tl.sum(tl.load(totals + head * parts + part, mask=there, other=0.0) * shrink, 0)
    places = sums + (head * parts + part[:, None]) * D + d[None, :]
    weighted = tl.load(places, mask=there[:, None] & (d < D)[None, :], other=0.0)
    result = tl.sum(weighted * shrink[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(y + head * D + d, result.to(y.dtype.element_ty), mask=d < D)


@functools.lru_cache(maxsize=4096)
def plan(
    batch: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    longest: int,
    itemsize: int,
    multiprocessors: int,
) -> tuple[int, dict[str, int]]:
    """The number of parts, and the constants; ``longest`` is the most tokens that the block table
    has room for."""
    group = heads // kv_heads
    columns = max(16, triton.next_power_of_2(head_size))
    parts = max(1, min(PROGRAMS * multiprocessors // (batch * kv_heads), longest // PART, PARTS))
    return parts, {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "ROWS": max(16, triton.next_power_of_2(group)),  # at least what a tensor core multiplies
        "D": head_size,
        "COLUMNS": columns,
        "BLOCK": max(16, min(128, TILE // itemsize // columns)),
    }


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # in the interpreter
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def second(parts: int, constants: dict[str, int]) -> dict[str, int]:
    """The constants of the second kernel."""
    return {name: constants[name] for name in SHAPE} | {"ROOM": triton.next_power_of_2(parts)}


def run(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """query [B, Hq, D] and pages [P, page, Hkv, D], unit inner strides; returns y [B, Hq, D]."""
    y = empty_output(query)
    if INTERPRETED:
        y = y.float()
    batch, heads, size = query.shape
    page, kv_heads = key_pages.shape[1:3]
    longest = block_table.shape[1] * page
    parts, constants = plan(
        batch, heads, kv_heads, size, longest, query.itemsize, _multiprocessors(query.device)
    )  # fmt: skip
    rows = batch * heads * parts if parts > 1 else 0
    sums = query.new_empty((rows, size), dtype=torch.float32)
    maxima, totals = query.new_empty((2, rows), dtype=torch.float32)
    with torch.cuda.device_of(query):
        attend[(batch * kv_heads, parts)](
            query, key_pages, value_pages, block_table, lengths, y, sums, maxima, totals,
            scale * LOG2_E, page, query.stride(0), query.stride(1), *key_pages.stride()[:3],
            *value_pages.stride()[:3], block_table.stride(0), parts, **constants, WIDEN=INTERPRETED,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        if parts > 1:
            add_parts[(batch * heads,)](sums, maxima, totals, y, parts, **second(parts, constants))
    return y.to(query.dtype)


def specializations() -> list[Specialization]:
    """28 heads that share 4 of 128 values, in many parts; 14 that share 2 of 64, and 8 of 256, in
    one."""
    values = dict.fromkeys(("query", "key_pages", "value_pages", "y"), "*bf16")
    numbers = dict.fromkeys(("block_table", "lengths"), "*i32")
    partial = dict.fromkeys(("sums", "maxima", "totals"), "*fp32")
    strides = dict.fromkeys(
        ("PAGE", "query_stride", "head_stride", "key_page", "key_token", "key_head", "value_page",
         "value_token", "value_head", "table_stride"), "i32",
    )  # fmt: skip
    signature = {**values, **numbers, **partial, **strides}
    found = []
    for batch, heads, kv_heads, size in [(1, 28, 4, 128), (512, 14, 2, 64), (256, 8, 8, 256)]:
        parts, constants = plan(batch, heads, kv_heads, size, 16384, 2, 132)
        label = f"{heads} heads of {size}, parts: {parts}"
        one = {"parts": 1} if parts == 1 else {}  # a launch makes a constant of it
        number = {} if one else {"parts": "i32"}
        found.append(
            Specialization(
                attend,
                {**signature, **number, "scale": "fp32"},
                {**constants, **one, "WIDEN": False},
                num_warps=WARPS,
                num_stages=STAGES,
                label=label,
                aligned=tuple(signature),
            )
        )
        if parts > 1:
            pointers = {**partial, "y": "*bf16"}
            found.append(
                Specialization(
                    add_parts,
                    {**pointers, **number},
                    second(parts, constants),
                    label=label,
                    aligned=tuple(pointers),
                )
            )
    return found
