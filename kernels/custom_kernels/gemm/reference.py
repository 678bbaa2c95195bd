# SPDX-License-Identifier: Apache-2.0
"""y = x · Wᵀ + b in plain torch: at torch's own speed, and exactly.

Tests and benchmarks compare every backend with ``exact``; ``run`` is what the operation costs
without a custom kernel, and the backend of last resort in the engine.
"""

import torch
from torch.nn.functional import linear


def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``torch.nn.functional.linear``: any floating dtype, any device."""
    return linear(x, weight, bias)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same in float64, [M, N] float64: the one definition of what is right."""
    return linear(x.double(), weight.double(), None if bias is None else bias.double())
