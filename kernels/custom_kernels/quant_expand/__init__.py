# SPDX-License-Identifier: Apache-2.0
"""quant_expand: per-token dynamic quantization to 8 bits, fused with the window expansion that lets
2:4 tensor cores run (2N-2):2N sparse weights.

This file is the operation: its public function, its argument checks (only here), and its
registration as ``torch.ops.custom_kernels.quant_expand``.
"""

import functools

import torch

from custom_kernels import launches, registry, sparsity
from custom_kernels.rows import as_rows

OPERATION = registry.operation("quant_expand")

BACKEND_PRIORITY = {"cuda": ("cuda", "triton", "reference"), "cpu": ("reference",)}
"""Backends per device type, best first."""

INPUTS = (torch.bfloat16, torch.float16)
OUTPUTS = (torch.int8, torch.float8_e4m3fn)

_pattern = functools.cache(sparsity.pattern)


def custom_quant_expand(
    x: torch.Tensor,
    pattern: str | None = None,
    dtype: torch.dtype = torch.int8,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize every row of x, each with a scale, and expand it for a (2N-2):2N pattern.

    ``x[..., k] ≈ q[..., i] * scale[...]`` with ``scale = max_k |x[..., k]| / qmax`` for every
    position i of k in the expanded row. ``reference.py`` is the exact definition, which every
    backend meets bit for bit; ``custom_kernels.sparsity`` defines the order of the expanded row.

    A row of zeros has q 0 and scale 0; a row with an infinity or a NaN has q 0 and scale NaN.

    Args:
        x: [..., K], bfloat16 or float16, K at least 1, any row stride; without unit inner stride x
            is copied first.
        pattern: of the weights that q will be multiplied with: ``"2:4"``, ``"4:6"``, ``"6:8"``,
            ``"8:10"``, ... up to ``"30:32"``; None only quantizes.
        dtype: of q: int8 (qmax 127) or float8_e4m3fn (qmax 448).
        backend: a name from ``OPERATION.backends``; None: the best for x's device.

    Returns:
        q [..., K'] of ``dtype`` and scale [...] float32, contiguous, on x's device. K' is
        ``sparsity.pattern(pattern).expanded(K)``; without a pattern it is K rounded up to a
        multiple of 16, the padding zeros.

    Raises:
        TypeError: x or ``dtype`` is of another dtype.
        ValueError: x has no K, or the pattern is of another kind.
        registry.BackendError: the backend does not exist or cannot run here.
    """
    q, scale = _op(x, pattern, dtype, backend or "")
    return q, scale


def expanded(k: int, pattern: str | None) -> int:
    """K': the length of the row that ``k`` values become."""
    if pattern is None:
        return -(-k // sparsity.SECTION_MULTIPLE) * sparsity.SECTION_MULTIPLE
    return _pattern(pattern).expanded(k)


def empty_output(
    x: torch.Tensor, pattern: str | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [..., K'] and scale [...], not yet written, contiguous. It is also what torch.compile
    traces with."""
    leading = x.shape[:-1]
    q = x.new_empty((*leading, expanded(x.shape[-1], pattern)), dtype=dtype)
    return q, x.new_empty(leading, dtype=torch.float32)


def _check(x: torch.Tensor, pattern: str | None, dtype: torch.dtype) -> None:
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"quant_expand: x must be [..., K] with K at least 1, got {list(x.shape)}")
    if x.dtype not in INPUTS:
        raise TypeError(f"quant_expand: x must be bfloat16 or float16, got {x.dtype}")
    check_kind("quant_expand", pattern, dtype)


def check_kind(operation: str, pattern: str | None, dtype: torch.dtype) -> None:
    """Raise, in the name of an operation that quantizes and expands, what does not fit."""
    if dtype not in OUTPUTS:
        raise TypeError(f"{operation}: dtype must be int8 or float8_e4m3fn, got {dtype}")
    if pattern is not None:
        try:
            kind = _pattern(pattern)
        except ValueError as error:
            raise ValueError(f"{operation}: {error}") from None
        if kind.mixed:
            raise ValueError(f"{operation}: for mixed weights expand for {kind.expansion}")


def _quant_expand(
    x: torch.Tensor, pattern: str | None, dtype: torch.dtype, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, pattern, dtype)
    backend = backend or OPERATION.best(x.device, x.dtype).name
    run = OPERATION.runner(backend, x.device, x.dtype)
    if x.numel() == 0:
        return empty_output(x, pattern, dtype)
    rows = as_rows(x)
    q, scale = run(rows, pattern, dtype)
    launches.record("quant_expand", backend, tokens=rows.shape[0])
    if x.dim() == 2:
        return q, scale
    return q.view(*x.shape[:-1], q.shape[-1]), scale.view(x.shape[:-1])


_op = OPERATION.register(
    "(Tensor x, str? pattern, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _quant_expand,
    _check,
)
