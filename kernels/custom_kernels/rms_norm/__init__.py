# SPDX-License-Identifier: Apache-2.0
"""rms_norm: RMS norm of the rows of x, or of x + residual, which is returned as well.

This file is the operation: its public function, its argument checks (only here), and its
registration as ``torch.ops.custom_kernels.rms_norm``.
"""

import torch

from custom_kernels import launches, registry
from custom_kernels.rows import as_rows

OPERATION = registry.operation("rms_norm")

BACKEND_PRIORITY = {"cuda": ("cuda", "triton", "cupy", "reference"), "cpu": ("reference",)}
"""Backends per device type, best first."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def custom_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    epsilon: float,
    *,
    layer: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize every row of x + residual: ``v = x + residual`` and
    ``y = v / sqrt(mean(v²) + epsilon) · weight``.

    Computed in float32. As in vLLM's own norm, what is multiplied with the weight is rounded to the
    weight's dtype before. For inference: there is no gradient.

    Args:
        x: [..., K], bfloat16, float16 or float32, K at least 1, any row stride; without unit inner
            stride x is copied first.
        residual: of x's shape and dtype, or None.
        weight: [K], of x's dtype or float32, or None for ones.
        epsilon: added to the mean of squares.
        layer: a tensor whose address tells ``launches`` which layer calls; nothing of it is read.
        backend: a name from ``OPERATION.backends``; None: the best for x's device.

    Returns:
        y [..., K], and the new residual [..., K], which is v, rounded; empty without a residual.
        Both are new, contiguous and of x's dtype: nothing is written in place, so that graphs stay
        functional.

    Raises:
        TypeError: a tensor is of another dtype.
        ValueError: shapes or devices do not fit.
        registry.BackendError: the backend does not exist or cannot run here.
    """
    y, total = _op(x, residual, weight, epsilon, layer, backend or "")
    return y, total


def empty_output(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    epsilon: float,
    layer: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the new residual, not yet written, contiguous. It is also what torch.compile traces
    with."""
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


def _check(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    epsilon: float,
    layer: torch.Tensor | None,
) -> None:
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"rms_norm: x must be [..., K] with K at least 1, got {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"rms_norm: x must be bfloat16, float16 or float32, got {x.dtype}")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"rms_norm: residual must be {list(x.shape)} like x, got {list(residual.shape)}"
            )
        if residual.dtype != x.dtype:
            raise TypeError(f"rms_norm: residual must be {x.dtype} like x, got {residual.dtype}")
    if weight is not None:
        if weight.shape != x.shape[-1:]:
            raise ValueError(
                f"rms_norm: weight must be [{x.shape[-1]}] like a row of x, got "
                f"{list(weight.shape)}"
            )
        if weight.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"rms_norm: weight must be {x.dtype} like x, or torch.float32, got {weight.dtype}"
            )
    for name, tensor in (("residual", residual), ("weight", weight)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"rms_norm: {name} must be on {x.device} like x, got {tensor.device}")


def _rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    epsilon: float,
    layer: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, residual, weight, epsilon, layer)
    backend = backend or OPERATION.best(x.device, x.dtype).name
    run = OPERATION.runner(backend, x.device, x.dtype)
    if x.numel() == 0:
        return empty_output(x, residual, weight, epsilon)
    rows = as_rows(x)
    other = None if residual is None else as_rows(residual)
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    y, total = run(rows, other, weight, epsilon)
    address = None if layer is None else layer.data_ptr()
    launches.record("rms_norm", backend, address, tokens=rows.shape[0])
    if x.dim() == 2:
        return y, total
    return y.view(x.shape), total if residual is None else total.view(x.shape)


_op = OPERATION.register(
    "(Tensor x, Tensor? residual, Tensor? weight, float epsilon, Tensor? layer, str backend) "
    "-> (Tensor, Tensor)",
    _rms_norm,
    _check,
)
