# SPDX-License-Identifier: Apache-2.0
"""silu_mul_quant: silu(gate) · up, and the quantization and expansion of it, in one pass.

This file is the operation: its public function, its argument checks (only here), and its
registration as ``torch.ops.custom_kernels.silu_mul_quant``.
"""

import torch

from custom_kernels import launches, registry
from custom_kernels.quant_expand import check_kind, expanded
from custom_kernels.rows import as_rows

OPERATION = registry.operation("silu_mul_quant")

BACKEND_PRIORITY = {"cuda": ("cuda", "reference"), "cpu": ("reference",)}
"""Backends per device type, best first."""


def custom_silu_mul_quant(
    x: torch.Tensor,
    pattern: str | None = None,
    dtype: torch.dtype = torch.int8,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activate every row of x, quantize it and expand it for a (2N-2):2N pattern.

    ``y = silu(gate) · up`` rounded to bfloat16, where gate is the first half of the row and up the
    second, and ``q, scale = custom_quant_expand(y, pattern, dtype)``, which explains both.
    ``reference.py`` is the exact definition, which every backend meets bit for bit.

    Args:
        x: [..., 2K], bfloat16, K at least 1, any row stride; without unit inner stride x is copied
            first.
        pattern: of the weights that q will be multiplied with, see ``custom_quant_expand``; None
            only quantizes.
        dtype: of q: int8 or float8_e4m3fn.
        backend: a name from ``OPERATION.backends``; None: the best for x's device.

    Returns:
        q [..., K'] of ``dtype`` and scale [...] float32, contiguous, on x's device.

    Raises:
        TypeError: x or ``dtype`` is of another dtype.
        ValueError: x has no halves, or the pattern is of another kind.
        registry.BackendError: the backend does not exist or cannot run here.
    """
    q, scale = _op(x, pattern, dtype, backend or "")
    return q, scale


def empty_output(
    x: torch.Tensor, pattern: str | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [..., K'] and scale [...], not yet written, contiguous. It is also what torch.compile
    traces with."""
    leading = x.shape[:-1]
    q = x.new_empty((*leading, expanded(x.shape[-1] // 2, pattern)), dtype=dtype)
    return q, x.new_empty(leading, dtype=torch.float32)


def _check(x: torch.Tensor, pattern: str | None, dtype: torch.dtype) -> None:
    if x.dim() < 1 or x.shape[-1] < 2 or x.shape[-1] % 2:
        raise ValueError(
            f"silu_mul_quant: x must be [..., 2K] with K at least 1, got {list(x.shape)}"
        )
    if x.dtype != torch.bfloat16:
        raise TypeError(f"silu_mul_quant: x must be bfloat16, got {x.dtype}")
    check_kind("silu_mul_quant", pattern, dtype)


def _silu_mul_quant(
    x: torch.Tensor, pattern: str | None, dtype: torch.dtype, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, pattern, dtype)
    backend = backend or OPERATION.best(x.device, x.dtype).name
    run = OPERATION.runner(backend, x.device, x.dtype)
    if x.numel() == 0:
        return empty_output(x, pattern, dtype)
    rows = as_rows(x)
    q, scale = run(rows, pattern, dtype)
    launches.record("silu_mul_quant", backend, tokens=rows.shape[0])
    if x.dim() == 2:
        return q, scale
    return q.view(*x.shape[:-1], q.shape[-1]), scale.view(x.shape[:-1])


_op = OPERATION.register(
    "(Tensor x, str? pattern, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _silu_mul_quant,
    _check,
)
