# SPDX-License-Identifier: Apache-2.0
"""silu(gate) · up, then quantization and expansion, in plain torch: the definition, bit for bit.

For every row of x, whose first half is the gate and whose second is up::

    y[k] = bfloat16(bfloat16(gate[k] / (1 + exp(-gate[k]))) · up[k])

rounded where vLLM's own activation is, as it is written. y is what the unfused activation returns;
how it is quantized: ``custom_kernels.quantization``, how the row is laid out:
``custom_kernels.sparsity``.
"""

import torch
from torch.nn.functional import silu

from custom_kernels.quantization import quantize
from custom_kernels.sparsity import expand
from custom_kernels.sparsity import pattern as parse_pattern


def run(
    x: torch.Tensor, pattern: str | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, 2K] of any strides; returns q [M, K'] and scale [M] float32."""
    q, scale = quantize(activate(x), dtype)
    return expand(q, parse_pattern(pattern) if pattern else None), scale


exact = run
"""Nothing is more exact than the definition."""


def activate(x: torch.Tensor) -> torch.Tensor:
    """y [M, K] of x's dtype: what the unfused activation returns."""
    gate, up = x.chunk(2, -1)
    return silu(gate) * up
