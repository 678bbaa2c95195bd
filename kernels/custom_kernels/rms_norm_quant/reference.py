# SPDX-License-Identifier: Apache-2.0
"""RMS norm, with or without a residual, then quantization and expansion, in plain torch: the
definition, bit for bit.

For every row, in float32 with IEEE divisions and roots::

    v = x + residual
    r = 1 / sqrt(mean_k v[k]² + epsilon)
    y[k] = bfloat16(bfloat16(v[k] · r) · weight[k])

rounded where vLLM's own norm is, as it is written. y is what an unfused norm returns; how it is
quantized: ``custom_kernels.quantization``, how the row is laid out: ``custom_kernels.sparsity``.
The new residual is v, rounded. float32 sums depend on their order, so it is fixed here:
``sum_of_squares``.
"""

import torch
from torch.nn.functional import pad

from custom_kernels.quantization import quantize
from custom_kernels.sparsity import expand
from custom_kernels.sparsity import pattern as parse_pattern

VECTOR = 8
"""Values that a thread loads at once."""
LANES = 512


def run(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    pattern: str | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x and residual [M, K], weight [K], of any strides; returns q [M, K'], scale [M] float32 and
    the new residual [M, K], empty without one."""
    y, total = normalize(x, residual, weight, epsilon)
    q, scale = quantize(y, dtype)
    return expand(q, parse_pattern(pattern) if pattern else None), scale, total


exact = run
"""Nothing is more exact than the definition."""


def normalize(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, K] and the new residual, both of x's dtype: what the unfused norm returns."""
    values = x.float()
    total = x.new_empty(0)
    if residual is not None:
        values = values + residual.float()
        total = values.to(x.dtype)
    squares = sum_of_squares(values)
    # Tensors and not numbers: torch divides by a number, and a number, by way of rounded
    # reciprocals.
    mean = squares / torch.full_like(squares, values.shape[-1])
    factor = torch.ones_like(mean) / (mean + epsilon).sqrt()
    return (values * factor.unsqueeze(-1)).to(x.dtype) * weight, total


def sum_of_squares(values: torch.Tensor) -> torch.Tensor:
    """[M, K] float32 → [M]. A vector is 8 values, of which the last four are added to the first
    four, and so on; vector i is added to lane i mod 512, in order; the lanes are added like the
    values of a vector."""
    rows, k = values.shape
    rounds = -(-k // (LANES * VECTOR))
    squares = pad(values * values, (0, rounds * LANES * VECTOR - k))
    vectors = _halves(squares.view(rows, rounds, LANES, VECTOR))
    lanes = vectors[:, 0]
    for i in range(1, rounds):
        lanes = lanes + vectors[:, i]
    return _halves(lanes)


def _halves(values: torch.Tensor) -> torch.Tensor:
    while (half := values.shape[-1] // 2) > 0:
        values = values[..., :half] + values[..., half:]
    return values[..., 0]
