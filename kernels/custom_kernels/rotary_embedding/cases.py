# SPDX-License-Identifier: Apache-2.0
"""The queries and keys of real models, at which rotary_embedding is measured.

They are slices of one projection, as vLLM has them, of variance 1; the angles are those of base
10,000.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from custom_kernels.check.baselines import compiled, compiling, vllm_kernel_missing
from custom_kernels.check.case import Case, Contender
from custom_kernels.check.models import DEFAULT_MODELS, MODELS
from custom_kernels.rotary_embedding import reference

__all__ = [
    "CAPTURED",
    "DEFAULT_MODELS",
    "DTYPES",
    "MODELS",
    "TOKENS",
    "baselines",
    "captured",
    "cases",
    "checks",
]

DTYPES = ("bfloat16", "float16", "float32")
"""What DTYPE= may say, the first by default."""

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
"""M: a decode step has as many rows as there are running requests, a prefill step up to vLLM's
batch limit."""

TOLERANCES = {"bfloat16": 5e-3, "float16": 6e-4, "float32": 1e-6}
"""‖out - exact‖ / ‖exact‖: rounding once to 8 or 11 bits gives about 1.7e-3 or 2.1e-4, and is off
by at most 3.9e-3 or 4.9e-4. vLLM's own kernel may round the products, too."""

POSITIONS = 4096

CAPTURED = ("rotary_embedding",)
"""The layers of a capture that this operation computes."""


def cases(models: Sequence[str], tokens: Sequence[int], dtype: str) -> Iterator[Case]:
    """The rotation of every one of ``models`` at every M of ``tokens``."""
    for name in models:
        model = MODELS[name]
        for m in tokens:
            labels: dict[str, str | int] = {"model": name, "layer": "rotary"}
            yield case(labels, m, model.heads, model.kv_heads, model.head_size, dtype)


def captured(
    labels: dict[str, str | int], m: int, shape: Mapping[str, int], dtype: str
) -> Iterator[Case]:
    """The rotation of M rows, of what `make capture` writes."""
    heads = shape["heads"], shape["kv_heads"], shape["head_size"]
    yield case(labels, m, *heads, dtype, shape["rotary"], bool(shape["is_neox"]))


def checks(dtype: str) -> Iterator[Case]:
    """Small shapes with every kind of edge: no row, one row, a head of one pair, heads that are no
    whole vectors, a part of a head that is not rotated, no key, both ways to make pairs."""
    for is_neox in (True, False):
        for m, heads, kv_heads, head_size, rotary in [
            (1, 4, 2, 64, 64),
            (3, 3, 1, 80, 32),
            (2, 1, 1, 2, 2),
            (2, 2, 1, 27, 10),
            (5, 2, 0, 128, 128),
        ]:
            labels: dict[str, str | int] = {"check": "halves" if is_neox else "neighbours"}
            yield case(labels, m, heads, kv_heads, head_size, dtype, rotary, is_neox)
    yield case({"check": "no row"}, 0, 2, 1, 64, dtype)
    yield case({"check": "many heads"}, 2, 64, 5, 64, dtype)
    yield case({"check": "cache in float32"}, 3, 2, 1, 64, dtype, cache=torch.float32)


def baselines(dtype: str) -> list[Contender]:
    """What a user would call instead: the rotation compiled by torch, as vLLM does without custom
    ops; torch alone; vLLM's own kernel."""

    return [
        Contender("torch.compile", compiled(reference.run), unavailable_reason=compiling),
        Contender("torch", reference.run),
        Contender("vllm", _vllm, unavailable_reason=vllm_kernel_missing("rotary_embedding")),
    ]


def case(
    labels: dict[str, str | int],
    m: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    dtype: str,
    rotary: int = 0,
    is_neox: bool = True,
    cache: torch.dtype | None = None,
) -> Case:
    """Query and key of variance 1, slices of rows that hold the values as well.

    Args:
        kv_heads: of the key; 0: there is none.
        rotary: values of a head that are rotated; 0: all.
        cache: its dtype; None: that of the query.
    """
    x_dtype: torch.dtype = getattr(torch, dtype)
    rotary = rotary or head_size
    split = (heads * head_size, kv_heads * head_size, kv_heads * head_size)

    def empty_inputs(device: torch.device) -> tuple[Any, ...]:
        qkv = torch.empty((m, sum(split)), dtype=x_dtype, device=device)
        query, key, _ = qkv.split(split, -1)
        positions = torch.empty(m, dtype=torch.int64, device=device)
        angles = torch.empty((POSITIONS, rotary), dtype=cache or x_dtype, device=device)
        return query, key if kv_heads else None, positions, angles, head_size, is_neox

    def fill(inputs: Sequence[Any]) -> None:
        query, key, positions, angles, *_ = inputs
        query.normal_()
        if key is not None:
            key.normal_()
        positions.random_(0, POSITIONS)
        steps = torch.arange(0, rotary, 2, device=query.device).double() / rotary
        places = torch.arange(POSITIONS, device=query.device).double()
        turns = places[:, None] / 10_000**steps
        angles.copy_(torch.cat([turns.cos(), turns.sin()], -1))

    item = x_dtype.itemsize
    moved = m * (2 * (heads + kv_heads) * head_size * item + 8)
    return Case(
        labels={**labels, "M": m, "heads": heads, "kv_heads": kv_heads, "head_size": head_size,
                "rotary": rotary},
        empty_inputs=empty_inputs,
        fill=fill,
        flops=3.0 * m * (heads + kv_heads) * rotary,
        bytes=float(moved + min(m, POSITIONS) * rotary * (cache or x_dtype).itemsize),
        tolerance=TOLERANCES[dtype],
        per_token=(0, 1, 2),
    )  # fmt: skip


def _vllm(
    query: torch.Tensor,
    key: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    is_neox: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    # It writes over query and key: into copies here, so that a call can be repeated, and so two
    # copies more than it takes in the engine.
    ops = importlib.import_module("vllm._custom_ops")
    query = query.clone(memory_format=torch.contiguous_format)
    other = None if key is None else key.clone(memory_format=torch.contiguous_format)
    ops.rotary_embedding(positions, query, other, head_size, cos_sin_cache, is_neox)
    return query, query.new_empty(0) if other is None else other
