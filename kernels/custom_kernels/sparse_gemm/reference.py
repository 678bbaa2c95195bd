# SPDX-License-Identifier: Apache-2.0
"""y = (A · Wᵀ) · a_scale · w_scale + b in plain torch, in float64: what is right.

The weight is kept expanded, and not compressed. Sums of products of 8-bit values are exact
in float64; the result is rounded once. It is far too slow to serve a model.
"""

import torch

from custom_kernels import quantization
from custom_kernels.sparse_gemm import _packing


def storage(expanded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The expanded weight [N, K'] with its zeros, as it is; no metadata."""
    return expanded, expanded.new_empty(0, dtype=torch.uint8)


def mixed_storage(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A mixed weight [N, K'], as it is; no metadata."""
    _packing.halves(weight)
    return storage(weight)


def run(*arguments: *_packing.Arguments) -> torch.Tensor:
    """a [M, K'], values [N, K']; returns [M, N] bfloat16."""
    a, a_scale, values, _, w_scale, bias, _ = arguments
    return dense(a, a_scale, values, w_scale, bias).bfloat16()


def exact(
    x: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    pattern: str,
) -> torch.Tensor:
    """The whole layer as it is measured, without any expansion, [M, N] float64: x [M, K] is
    quantized where the weight [N, K] is of an 8-bit dtype."""
    if w_scale is None:
        return dense(x, None, weight, None, bias)
    return dense(*quantization.quantize(x, weight.dtype), weight, w_scale, bias)


def dense(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    weight: torch.Tensor,
    w_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The formula with a dense weight [N, K] (or the expanded one), in float64."""
    out = a.double() @ weight.double().t()
    if a_scale is not None:
        out = out * a_scale.double().unsqueeze(-1)
    if w_scale is not None:
        out = out * w_scale.double()
    return out if bias is None else out + bias.double()
