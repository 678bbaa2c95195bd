# SPDX-License-Identifier: Apache-2.0
"""silu(gate) · up in plain torch: at torch's own speed, and exactly.

For every row of x, whose first half is the gate and whose second is up::

    y[k] = gate[k] / (1 + exp(-gate[k])) · up[k]

Tests and benchmarks compare every backend with ``exact``; ``run`` rounds where vLLM's own
activation does and is the backend of vLLM's engine on the CPU.
"""

import torch
from torch.nn.functional import silu


def run(x: torch.Tensor) -> torch.Tensor:
    """x [M, 2K] of any strides; returns y [M, K]."""
    gate, up = x.chunk(2, -1)
    return silu(gate) * up


def exact(x: torch.Tensor) -> torch.Tensor:
    """The same in float64, not rounded: the one definition of what is right."""
    return run(x.double())
