# SPDX-License-Identifier: Apache-2.0
"""y = silu(x) * scale in plain torch: at torch's own speed, and exactly."""

import torch
from torch.nn.functional import silu


def run(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What the operation costs without a kernel of ours."""
    return (silu(x.float()) * scale.float()).to(x.dtype)


def exact(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The same in float64: the one definition of what is right."""
    return silu(x.double()) * scale.double()
