# SPDX-License-Identifier: Apache-2.0
"""Decode steps of real models, at which paged_attention is measured.

Keys and values lie as in vLLM's cache: pages of 16 tokens, each [Hkv, 16, 2D] with a key and a
value side by side, in a random order. All sequences of a case have the same length.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from custom_kernels.check.case import Case, Contender
from custom_kernels.check.models import DEFAULT_MODELS, MODELS

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

TOKENS = (1, 4, 16, 64)
"""M: a decode step has a row for each running request."""

LENGTHS = (512, 4096, 16384)
"""Tokens of each sequence."""

PAGE = 16

TOLERANCES = {"bfloat16": 5e-3, "float16": 6e-4, "float32": 3e-6}
"""‖out - exact‖ / ‖exact‖: rounding y to 8 or 11 bits gives about 1.7e-3 or 2.1e-4, and rounding
the softmax for the tensor cores as much again."""

CAPTURED = ("paged_attention",)
"""The layers of a capture that this operation computes."""


def cases(models: Sequence[str], tokens: Sequence[int], dtype: str) -> Iterator[Case]:
    """A decode step of every one of ``models`` for M sequences of every length."""
    for name in models:
        model = MODELS[name]
        for length in LENGTHS:
            for m in tokens:
                labels: dict[str, str | int] = {"model": name, "layer": f"{length} tokens"}
                heads = model.heads, model.kv_heads, model.head_size
                yield case(labels, m, *heads, dtype, length)


def captured(
    labels: dict[str, str | int], m: int, shape: Mapping[str, int], dtype: str
) -> Iterator[Case]:
    """A decode step of M sequences of equal length, of what `make capture` writes."""
    heads = shape["heads"], shape["kv_heads"], shape["head_size"]
    yield case(labels, m, *heads, dtype, shape["length"], shape["page"])


def checks(dtype: str) -> Iterator[Case]:
    """Small shapes with every kind of edge: no row, one row, one token, sequences of any length,
    none among them, pages of another size, heads that are no power of two, more than one part."""
    yield case({"check": "no row"}, 0, 2, 1, 64, dtype, 16)
    for m, heads, kv_heads, head_size, longest, page in [
        (1, 4, 2, 64, 1, 16),
        (1, 2, 1, 32, 700, 16),
        (3, 7, 1, 80, 70, 32),
        (4, 5, 5, 24, 33, 1),
    ]:
        yield case(
            {"check": "any length"}, m, heads, kv_heads, head_size, dtype, longest, page, vary=True
        )


def baselines(dtype: str) -> list[Contender]:
    """What a user would call instead: torch's attention, which needs keys and values without pages
    and so gets them side by side in memory; FlashAttention as vLLM runs it on most GPUs."""
    found = [Contender("torch", _torch, prepare=_without_pages)]
    if dtype != "float32":
        found.append(Contender("vllm", _vllm, unavailable_reason=_vllm_missing))
    return found


def case(
    labels: dict[str, str | int],
    m: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    dtype: str,
    length: int,
    page: int = PAGE,
    vary: bool = False,
) -> Case:
    """Query, keys and values of variance 1.

    Args:
        length: of each sequence, or with ``vary`` the most: then the first has it, the second is
            empty, and the others have any.
    """
    x_dtype: torch.dtype = getattr(torch, dtype)
    width = -(-length // page)

    def empty_inputs(device: torch.device) -> tuple[Any, ...]:
        query = torch.empty((m, heads, head_size), dtype=x_dtype, device=device)
        cache = torch.empty(
            (max(1, m * width), kv_heads, page, 2 * head_size), dtype=x_dtype, device=device
        )
        keys, values = cache.transpose(1, 2).split(head_size, -1)
        table = torch.empty((m, width), dtype=torch.int32, device=device)
        lengths = torch.empty(m, dtype=torch.int32, device=device)
        return query, keys, values, table, lengths, head_size**-0.5

    def fill(inputs: Sequence[Any]) -> None:
        query, keys, values, table, lengths, _ = inputs
        for tensor in (query, keys, values):
            tensor.normal_()
        table.copy_(torch.randperm(m * width, device=table.device).view(m, width))
        lengths.fill_(length)
        if vary:
            lengths[1:].random_(0, length + 1)
            lengths[1:2] = 0

    item = x_dtype.itemsize
    return Case(
        labels={**labels, "M": m, "heads": heads, "kv_heads": kv_heads, "head_size": head_size,
                "length": length, "page": page},
        empty_inputs=empty_inputs,
        fill=fill,
        flops=4.0 * m * heads * head_size * length,
        bytes=float(2 * m * (heads + kv_heads * length) * head_size * item + 4 * m * (width + 1)),
        tolerance=TOLERANCES[dtype],
        per_token=(0, 3, 4),
    )  # fmt: skip


def _without_pages(inputs: Sequence[Any]) -> Sequence[Any]:
    query, keys, values, table, lengths, scale = inputs
    longest = int(lengths[0])  # all are equal where this is measured

    def contiguous(pages: torch.Tensor) -> torch.Tensor:
        return pages[table].flatten(1, 2)[:, :longest].transpose(1, 2).contiguous()

    return query, contiguous(keys), contiguous(values), scale


def _torch(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    y = scaled_dot_product_attention(query[:, :, None], keys, values, scale=scale, enable_gqa=True)
    return y[:, :, 0]


def _vllm_missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "vLLM's FlashAttention runs on CUDA devices"
    try:
        found = importlib.import_module("vllm.v1.attention.backends.fa_utils")
    except ImportError as error:
        return f"vLLM cannot be imported: {error}"
    return None if found.get_flash_attn_version() else "this vLLM has no FlashAttention here"


def _vllm(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    found = importlib.import_module("vllm.v1.attention.backends.fa_utils")
    y: torch.Tensor = found.flash_attn_varlen_func(
        query,
        keys,
        values,
        max_seqlen_q=1,
        cu_seqlens_q=torch.arange(query.shape[0] + 1, dtype=torch.int32, device=query.device),
        max_seqlen_k=table.shape[1] * keys.shape[1],
        seqused_k=lengths,
        block_table=table,
        softmax_scale=scale,
        fa_version=found.get_flash_attn_version(),
    )
    return y
