# SPDX-License-Identifier: Apache-2.0
"""rms_norm_quant: RMS norm, with or without a residual, and the quantization and expansion of what
it returns, in one pass over the row.

This file is the operation: its public function, its argument checks (only here), and its
registration as ``torch.ops.custom_kernels.rms_norm_quant``.
"""

import torch

from custom_kernels import launches, registry
from custom_kernels.quant_expand import check_kind, expanded
from custom_kernels.rows import as_rows

OPERATION = registry.operation("rms_norm_quant")

BACKEND_PRIORITY = {"cuda": ("cuda", "reference"), "cpu": ("reference",)}
"""Backends per device type, best first."""


def custom_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    pattern: str | None = None,
    dtype: torch.dtype = torch.int8,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalize every row of x + residual, quantize it and expand it for a (2N-2):2N pattern.

    ``v = x + residual``, ``y = v / sqrt(mean(v²) + epsilon) · weight`` rounded to bfloat16, and
    ``q, scale = custom_quant_expand(y, pattern, dtype)``, which explains both. ``reference.py`` is
    the exact definition, which every backend meets bit for bit.

    Args:
        x: [..., K], bfloat16, K at least 1, any row stride; without unit inner stride x is copied
            first.
        residual: of x's shape and dtype, or None.
        weight: [K], bfloat16.
        pattern: of the weights that q will be multiplied with, see ``custom_quant_expand``; None
            only quantizes.
        dtype: of q: int8 or float8_e4m3fn.
        backend: a name from ``OPERATION.backends``; None: the best for x's device.

    Returns:
        q [..., K'] of ``dtype``, scale [...] float32, and the new residual [..., K] bfloat16, which
        is v, rounded; empty without a residual. All are new and contiguous: nothing is written in
        place, so that graphs stay functional.

    Raises:
        TypeError: a tensor or ``dtype`` is of another dtype.
        ValueError: shapes do not fit, or the pattern is of another kind.
        registry.BackendError: the backend does not exist or cannot run here.
    """
    q, scale, total = _op(x, residual, weight, epsilon, pattern, dtype, backend or "")
    return q, scale, total


def empty_output(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    pattern: str | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [..., K'], scale [...] and the new residual, not yet written, contiguous. It is also what
    torch.compile traces with."""
    leading = x.shape[:-1]
    q = x.new_empty((*leading, expanded(x.shape[-1], pattern)), dtype=dtype)
    scale = x.new_empty(leading, dtype=torch.float32)
    return q, scale, x.new_empty(0 if residual is None else x.shape)


def _check(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    pattern: str | None,
    dtype: torch.dtype,
) -> None:
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(
            f"rms_norm_quant: x must be [..., K] with K at least 1, got {list(x.shape)}"
        )
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm_quant: weight must be [{x.shape[-1]}] like a row of x, got "
            f"{list(weight.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"rms_norm_quant: residual must be {list(x.shape)} like x, got {list(residual.shape)}"
        )
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight)):
        if tensor is not None and tensor.dtype != torch.bfloat16:
            raise TypeError(f"rms_norm_quant: {name} must be bfloat16, got {tensor.dtype}")
    check_kind("rms_norm_quant", pattern, dtype)


def _rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    pattern: str | None,
    dtype: torch.dtype,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, residual, weight, epsilon, pattern, dtype)
    backend = backend or OPERATION.best(x.device, x.dtype).name
    run = OPERATION.runner(backend, x.device, x.dtype)
    if x.numel() == 0:
        return empty_output(x, residual, weight, epsilon, pattern, dtype)
    rows = as_rows(x)
    other = None if residual is None else as_rows(residual)
    q, scale, total = run(rows, other, weight.contiguous(), epsilon, pattern, dtype)
    launches.record("rms_norm_quant", backend, tokens=rows.shape[0])
    if x.dim() == 2:
        return q, scale, total
    leading = x.shape[:-1]
    return (
        q.view(*leading, q.shape[-1]),
        scale.view(leading),
        total if residual is None else total.view(x.shape),
    )


_op = OPERATION.register(
    "(Tensor x, Tensor? residual, Tensor weight, float epsilon, str? pattern, ScalarType dtype, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _rms_norm_quant,
    _check,
)
