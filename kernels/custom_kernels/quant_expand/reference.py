# SPDX-License-Identifier: Apache-2.0
"""Per-token quantization and window expansion in plain torch: the definition, bit for bit.

How a row is quantized: ``custom_kernels.quantization``; how the quantized row is laid out:
``custom_kernels.sparsity``.
"""

import torch

from custom_kernels.quantization import quantize
from custom_kernels.sparsity import expand
from custom_kernels.sparsity import pattern as parse_pattern


def run(
    x: torch.Tensor, pattern: str | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] of any floating dtype and any strides; returns q [M, K'] and scale [M] float32."""
    q, scale = quantize(x, dtype)
    return expand(q, parse_pattern(pattern) if pattern else None), scale


exact = run
"""Nothing is more exact than the definition."""
