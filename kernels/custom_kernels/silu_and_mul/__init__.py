# SPDX-License-Identifier: Apache-2.0
"""silu_and_mul: silu(gate) · up, the activation between a model's two feed-forward layers.

This file is the operation: its public function, its argument checks (only here), and its
registration as ``torch.ops.custom_kernels.silu_and_mul``.
"""

import torch

from custom_kernels import launches, registry
from custom_kernels.rows import as_rows

OPERATION = registry.operation("silu_and_mul")

BACKEND_PRIORITY = {"cuda": ("cuda", "triton", "cupy", "reference"), "cpu": ("reference",)}
"""Backends per device type, best first."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def custom_silu_and_mul(
    x: torch.Tensor, *, layer: torch.Tensor | None = None, backend: str | None = None
) -> torch.Tensor:
    """Activate every row of x: ``y[k] = x[k] / (1 + exp(-x[k])) · x[K + k]``.

    Computed in float32. As in vLLM's own activation, the quotient is rounded before it is
    multiplied. For inference: there is no gradient.

    Args:
        x: [..., 2K], bfloat16, float16 or float32, K at least 1, any row stride; without unit inner
            stride x is copied first. Its first half is the gate, its second is up.
        layer: a tensor whose address tells ``launches`` which layer calls; nothing of it is read.
        backend: a name from ``OPERATION.backends``; None: the best for x's device.

    Returns:
        [..., K], contiguous, dtype and device of x.

    Raises:
        TypeError: x is of another dtype.
        ValueError: x has no halves.
        registry.BackendError: the backend does not exist or cannot run here.
    """
    return _op(x, layer, backend or "")


def empty_output(x: torch.Tensor, layer: torch.Tensor | None = None) -> torch.Tensor:
    """y, not yet written, contiguous. It is also what torch.compile traces with."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _check(x: torch.Tensor, layer: torch.Tensor | None) -> None:
    if x.dim() < 1 or x.shape[-1] < 2 or x.shape[-1] % 2:
        raise ValueError(
            f"silu_and_mul: x must be [..., 2K] with K at least 1, got {list(x.shape)}"
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"silu_and_mul: x must be bfloat16, float16 or float32, got {x.dtype}")


def _silu_and_mul(x: torch.Tensor, layer: torch.Tensor | None, backend: str) -> torch.Tensor:
    _check(x, layer)
    backend = backend or OPERATION.best(x.device, x.dtype).name
    run = OPERATION.runner(backend, x.device, x.dtype)
    if x.numel() == 0:
        return empty_output(x)
    rows = as_rows(x)
    y = run(rows)
    address = None if layer is None else layer.data_ptr()
    launches.record("silu_and_mul", backend, address, tokens=rows.shape[0])
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


_op = OPERATION.register("(Tensor x, Tensor? layer, str backend) -> Tensor", _silu_and_mul, _check)
