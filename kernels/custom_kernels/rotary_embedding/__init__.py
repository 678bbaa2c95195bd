# SPDX-License-Identifier: Apache-2.0
"""rotary_embedding: queries and keys, rotated by angles that grow with the token's position.

This file is the operation: its public function, its argument checks (only here), and its
registration as ``torch.ops.custom_kernels.rotary_embedding``.
"""

import torch

from custom_kernels import launches, registry
from custom_kernels.rows import as_rows

OPERATION = registry.operation("rotary_embedding")

BACKEND_PRIORITY = {"cuda": ("cuda", "triton", "cupy", "reference"), "cpu": ("reference",)}
"""Backends per device type, best first."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def custom_rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    is_neox: bool,
    *,
    layer: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate pairs of values of every head: ``(a, b)`` becomes
    ``(a · cos - b · sin, b · cos + a · sin)``, with cos and sin of the pair and the position.

    Pair i of a head is, with R = rotary_dim, the values i and R/2 + i (``is_neox``) or 2i and
    2i + 1; what follows the first R values of a head stays as it is. Computed in float32, rounded
    once. For inference: there is no gradient.

    Args:
        query: [M, heads · head_size] or [M, heads, head_size], bfloat16, float16 or float32, any
            row stride, as that of a slice of one projection; else it is copied first.
        key: the same with its own number of heads, or None.
        positions: [M], int64, from 0 to P - 1, which is not checked.
        cos_sin_cache: [P, R] of query's dtype or float32: R/2 cosines, then R/2 sines; R is even
            and at most head_size.
        head_size: values of a head.
        is_neox: which values are pairs.
        layer: a tensor whose address tells ``launches`` which layer calls; nothing of it is read.
        backend: a name from ``OPERATION.backends``; None: the best for query's device.

    Returns:
        query and key, or None, of the given shapes and dtype, new and contiguous: nothing is
        written in place, so that graphs stay functional.

    Raises:
        TypeError: a tensor is of another dtype.
        ValueError: shapes or devices do not fit.
        registry.BackendError: the backend does not exist or cannot run here.
    """
    rotated, rotated_key = _op(
        query, key, positions, cos_sin_cache, head_size, is_neox, layer, backend or ""
    )
    return rotated, None if key is None else rotated_key


def empty_output(
    query: torch.Tensor,
    key: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    is_neox: bool,
    layer: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query and key, not yet written, contiguous; without a key it is empty. It is also what
    torch.compile traces with."""
    return query.new_empty(query.shape), query.new_empty(0 if key is None else key.shape)


def _check(
    query: torch.Tensor,
    key: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    is_neox: bool,
    layer: torch.Tensor | None,
) -> None:
    if query.dtype not in DTYPES:
        raise TypeError(
            f"rotary_embedding: query must be bfloat16, float16 or float32, got {query.dtype}"
        )
    for name, heads in (("query", query), ("key", key)):
        if heads is None:
            continue
        width = heads.shape[-1] if heads.dim() else 0
        fits = width == head_size if heads.dim() == 3 else width % max(1, head_size) == 0
        if heads.dim() not in (2, 3) or head_size < 1 or not fits:
            raise ValueError(
                f"rotary_embedding: {name} must be [M, heads · {head_size}] or "
                f"[M, heads, {head_size}], got {list(heads.shape)}"
            )
        if heads.shape[0] != query.shape[0]:
            raise ValueError(
                f"rotary_embedding: key must have {query.shape[0]} rows like query, got "
                f"{heads.shape[0]}"
            )
        if heads.dtype != query.dtype:
            raise TypeError(
                f"rotary_embedding: key must be {query.dtype} like query, got {heads.dtype}"
            )
    if positions.shape != query.shape[:1] or positions.dtype != torch.int64:
        raise ValueError(
            f"rotary_embedding: positions must be [{query.shape[0]}] int64, one for each row, got "
            f"{list(positions.shape)} {positions.dtype}"
        )
    rotary = cos_sin_cache.shape[-1] if cos_sin_cache.dim() == 2 else 0
    if rotary < 2 or rotary % 2 or rotary > head_size:
        raise ValueError(
            "rotary_embedding: cos_sin_cache must be [positions, R] with an even R of at most "
            f"{head_size}, got {list(cos_sin_cache.shape)}"
        )
    if cos_sin_cache.dtype not in (query.dtype, torch.float32):
        raise TypeError(
            f"rotary_embedding: cos_sin_cache must be {query.dtype} like query, or torch.float32, "
            f"got {cos_sin_cache.dtype}"
        )
    for name, tensor in (("key", key), ("positions", positions), ("cos_sin_cache", cos_sin_cache)):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(
                f"rotary_embedding: {name} must be on {query.device} like query, "
                f"got {tensor.device}"
            )


def _rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    is_neox: bool,
    layer: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(query, key, positions, cos_sin_cache, head_size, is_neox, layer)
    backend = backend or OPERATION.best(query.device, query.dtype).name
    run = OPERATION.runner(backend, query.device, query.dtype)
    if query.numel() == 0 or (key is not None and key.numel() == 0):
        if query.shape[0]:
            raise ValueError("rotary_embedding: query and key must have a head at least")
        return empty_output(query, key, positions, cos_sin_cache, head_size, is_neox)
    rotated, rotated_key = run(
        as_rows(query.flatten(1)),
        None if key is None else as_rows(key.flatten(1)),
        positions.contiguous(),
        cos_sin_cache.contiguous(),
        head_size,
        is_neox,
    )
    address = None if layer is None else layer.data_ptr()
    launches.record("rotary_embedding", backend, address, tokens=query.shape[0])
    return rotated.view(query.shape), rotated_key if key is None else rotated_key.view(key.shape)


_op = OPERATION.register(
    "(Tensor query, Tensor? key, Tensor positions, Tensor cos_sin_cache, int head_size, "
    "bool is_neox, Tensor? layer, str backend) -> (Tensor, Tensor)",
    _rotary_embedding,
    _check,
)
