# SPDX-License-Identifier: Apache-2.0
"""paged_attention: attention of one query per sequence to the keys and values of a paged cache, as
an engine needs it when it decodes.

This file is the operation: its public function, its argument checks (only here), and its
registration as ``torch.ops.custom_kernels.paged_attention``.
"""

import torch

from custom_kernels import launches, registry

OPERATION = registry.operation("paged_attention")

BACKEND_PRIORITY = {"cuda": ("triton", "cuda", "cupy", "reference"), "cpu": ("reference",)}
"""Backends per device type, best first."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def custom_paged_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    *,
    layer: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attend with one query of every sequence to all of its keys:
    ``y = sum over t of softmax(scale · q · k[t]) · v[t]``, t from 0 to the length - 1.

    Token t of sequence b is in page ``block_table[b, t // page]`` at place ``t % page``. Query head
    h reads key and value head ``h // (Hq / Hkv)``. Computed in float32, rounded once. For
    inference: there is no gradient.

    Args:
        query: [B, Hq, D], bfloat16, float16 or float32; without unit inner stride it is copied.
        key_pages: [P, page, Hkv, D] of query's dtype with unit inner stride, any other strides: a
            view of the cache, which is never copied. Hkv divides Hq.
        value_pages: the same for the values.
        block_table: [B, W] int32, the numbers of each sequence's pages, which are not checked;
            those behind the last that a length needs are not read.
        lengths: [B] int32, at most W · page, which is not checked; a sequence of length 0 gets
            zeros.
        scale: of the products, usually 1 / sqrt(D).
        layer: a tensor whose address tells ``launches`` which layer calls; nothing of it is read.
        backend: a name from ``OPERATION.backends``; None: the best for query's device.

    Returns:
        [B, Hq, D], contiguous, dtype and device of query.

    Raises:
        TypeError: a tensor is of another dtype.
        ValueError: shapes, strides or devices do not fit.
        registry.BackendError: the backend does not exist or cannot run here.

    Source: Kwon et al., Efficient Memory Management for Large Language Model Serving with
    PagedAttention, 2023.
    """
    return _op(
        query, key_pages, value_pages, block_table, lengths, scale, layer, backend or ""
    )  # fmt: skip


def empty_output(query: torch.Tensor, *rest: object) -> torch.Tensor:
    """y, not yet written, contiguous. It is also what torch.compile traces with."""
    return query.new_empty(query.shape)


def _check(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    layer: torch.Tensor | None,
) -> None:
    if query.dim() != 3 or 0 in query.shape[1:]:
        raise ValueError(
            "paged_attention: query must be [B, Hq, D] with a head of one value at least, got "
            f"{list(query.shape)}"
        )
    if query.dtype not in DTYPES:
        raise TypeError(
            f"paged_attention: query must be bfloat16, float16 or float32, got {query.dtype}"
        )
    batch, heads, size = query.shape
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        if pages.dtype != query.dtype:
            raise TypeError(
                f"paged_attention: {name} must be {query.dtype} like query, got {pages.dtype}"
            )
        kv_heads = pages.shape[2] if pages.dim() == 4 else 0
        fits = kv_heads and heads % kv_heads == 0 and pages.shape[3] == size and pages.shape[1]
        if not fits or pages.shape != key_pages.shape:
            raise ValueError(
                f"paged_attention: {name} must be [P, page, Hkv, {size}] with the same Hkv, a "
                f"divisor of {heads}, for keys and values, got {list(pages.shape)}"
            )
        if pages.stride(3) != 1 and size > 1:
            raise ValueError(
                f"paged_attention: {name} must have unit inner stride, got strides "
                f"{list(pages.stride())}"
            )
    for name, numbers, dims in (("block_table", block_table, 2), ("lengths", lengths, 1)):
        fits = numbers.dim() == dims and numbers.shape[0] == batch
        if not fits or numbers.dtype != torch.int32:
            raise ValueError(
                f"paged_attention: {name} must be [{batch}{', W' if dims == 2 else ''}] int32, a "
                f"row for each of query's, got {list(numbers.shape)} {numbers.dtype}"
            )
    for name, tensor in (
        ("key_pages", key_pages), ("value_pages", value_pages), ("block_table", block_table),
        ("lengths", lengths),
    ):  # fmt: skip
        if tensor.device != query.device:
            raise ValueError(
                f"paged_attention: {name} must be on {query.device} like query, got {tensor.device}"
            )


def _paged_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    layer: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    _check(query, key_pages, value_pages, block_table, lengths, scale, layer)
    backend = backend or OPERATION.best(query.device, query.dtype).name
    run = OPERATION.runner(backend, query.device, query.dtype)
    if query.shape[0] == 0:
        return empty_output(query)
    if block_table.shape[1] == 0 or key_pages.shape[0] == 0:
        return torch.zeros_like(query, memory_format=torch.contiguous_format)
    y = run(
        query if query.stride(2) == 1 else query.contiguous(),
        key_pages,
        value_pages,
        block_table if block_table.stride(1) == 1 else block_table.contiguous(),
        lengths.contiguous(),
        scale,
    )
    address = None if layer is None else layer.data_ptr()
    launches.record("paged_attention", backend, address, tokens=query.shape[0])
    return y


_op = OPERATION.register(
    "(Tensor query, Tensor key_pages, Tensor value_pages, Tensor block_table, Tensor lengths, "
    "float scale, Tensor? layer, str backend) -> Tensor",
    _paged_attention,
    _check,
)
