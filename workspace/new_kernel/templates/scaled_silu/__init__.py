# SPDX-License-Identifier: Apache-2.0
"""scaled_silu: y = silu(x) * scale, row by row.

This file is the operation: its public function, its argument checks (here and nowhere else), and
its registration with torch as ``torch.ops.custom_kernels.scaled_silu``, so that it is one node
under torch.compile and in vLLM.
"""

import torch

from custom_kernels import launches, registry

OPERATION = registry.operation("scaled_silu")

BACKEND_PRIORITY = {"cuda": ("reference",), "cpu": ("reference",)}
"""Backends per device type, best first: put yours to the front once it is faster."""


def custom_scaled_silu(
    x: torch.Tensor, scale: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """``y[..., k] = x[..., k] / (1 + exp(-x[..., k])) * scale[k]``, computed in float32 and rounded
    once. For inference: there is no gradient.

    Args:
        x: [..., K], floating point; copied where it is not contiguous.
        scale: [K], dtype and device of x.
        backend: a name from ``OPERATION.backends``; None takes the best for x.

    Returns:
        [..., K], contiguous, dtype and device of x.

    Raises:
        TypeError: the dtypes differ, or are not floating point.
        ValueError: shapes or devices do not fit.
        registry.BackendError: the backend does not exist, cannot run here, or does not support this
            dtype.
    """
    return _op(x, scale, backend or "")


def empty_output(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The output, not yet written. It is also what torch.compile traces with."""
    return x.new_empty(x.shape)


def _check(x: torch.Tensor, scale: torch.Tensor) -> None:
    if x.dim() < 1 or scale.shape != x.shape[-1:]:
        raise ValueError(
            f"scaled_silu: x must be [..., K] and scale [K], got {list(x.shape)} and "
            f"{list(scale.shape)}"
        )
    if not x.is_floating_point() or scale.dtype != x.dtype:
        raise TypeError(
            f"scaled_silu: x and scale must share one floating dtype, got {x.dtype}, {scale.dtype}"
        )
    if scale.device != x.device:
        raise ValueError(
            f"scaled_silu: x and scale must be on one device, got {x.device}, {scale.device}"
        )


def _scaled_silu(x: torch.Tensor, scale: torch.Tensor, backend: str) -> torch.Tensor:
    _check(x, scale)
    backend = backend or OPERATION.best(x.device, x.dtype).name
    run = OPERATION.runner(backend, x.device, x.dtype)
    if x.numel() == 0:
        return empty_output(x, scale)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out: torch.Tensor = run(rows, scale.contiguous())
    launches.record("scaled_silu", backend, tokens=rows.shape[0])
    return out.view(x.shape)


_op = OPERATION.register("(Tensor x, Tensor scale, str backend) -> Tensor", _scaled_silu, _check)
