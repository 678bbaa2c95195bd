# SPDX-License-Identifier: Apache-2.0
"""RMS norm, with or without a residual, in plain torch: at torch's own speed, and exactly.

For every row::

    v = x + residual
    y[k] = v[k] / sqrt(mean_k v[k]² + epsilon) · weight[k]

Tests and benchmarks compare every backend with ``exact``; ``run`` rounds where vLLM's own norm does
and is the backend of vLLM's engine on the CPU.
"""

import torch


def run(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual [M, K], weight [K], of any strides; returns y [M, K] and the new residual
    [M, K], empty without one."""
    values = x.float()
    total = x.new_empty(0)
    if residual is not None:
        values = values + residual
        total = values.to(x.dtype)
    # In one pass over the row, where pow and mean take two.
    norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    y = values * torch.rsqrt(norm.square() / x.shape[-1] + epsilon)
    if weight is not None:
        y = y.to(weight.dtype) * weight
    return y.to(x.dtype), total


def exact(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64, not rounded: the one definition of what is right."""
    values = x.double() if residual is None else x.double() + residual.double()
    y = values / (values.square().mean(-1, keepdim=True) + epsilon).sqrt()
    if weight is not None:
        y = y * weight.double()
    return y, values.new_empty(0) if residual is None else values
