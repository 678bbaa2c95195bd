# SPDX-License-Identifier: Apache-2.0
"""Per-token quantization and window expansion in plain torch: the definition, bit for bit.

For every row of x, in float32 with IEEE divisions::

    amax = max_k |x[k]|
    inv, scale = qmax / amax, amax / qmax
    q[k] = x[k] * inv, clamped to ±qmax, rounded to nearest even into the output's dtype

with qmax 127 for int8 and 448 for float8_e4m3fn. Where the product x[k] * inv is not a number, q is
0: so a row of zeros has q 0 and scale 0. A row with an infinity or a NaN has q 0 and scale NaN, so
that whatever is computed with it is visibly NaN.

The quantized row is then expanded as ``custom_kernels.sparsity`` lays it out.
"""

import torch
from torch.nn.functional import pad

from custom_kernels import sparsity
from custom_kernels.sparsity import SECTION_MULTIPLE, Pattern

QMAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest quantized value of each output dtype."""


def run(
    x: torch.Tensor, pattern: str | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] of any floating dtype and any strides; returns q [M, K'] and scale [M] float32."""
    q, scale = quantize(x, dtype)
    return expand(q, sparsity.pattern(pattern) if pattern else None), scale


exact = run
"""Nothing is more exact than the definition."""


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """q [M, K] of ``dtype`` and scale [M] float32, not expanded."""
    values = x.float()
    amax = values.abs().amax(-1)
    # A tensor and not a number: torch divides a number by a tensor, and on GPUs a tensor by a
    # number, by way of a rounded reciprocal.
    qmax = torch.full_like(amax, QMAX[dtype])
    finite = amax.isfinite()
    product = values * (qmax / amax).unsqueeze(-1)
    keep = finite.unsqueeze(-1) & ~product.isnan()
    product = product.clamp(-QMAX[dtype], QMAX[dtype]).where(keep, 0.0)
    if dtype == torch.int8:
        product = product.round()
    return product.to(dtype), (amax / qmax).where(finite, torch.nan)


def expand(values: torch.Tensor, pattern: Pattern | None) -> torch.Tensor:
    """[..., K] of any dtype into [..., K']: the even section, the odd section, and zeros.

    Without a pattern the row is only padded with zeros to a multiple of 16.
    """
    k = values.shape[-1]
    if pattern is None:
        return pad(values, (0, -k % SECTION_MULTIPLE))
    count = pattern.groups(k)
    groups = pad(values, (0, count * pattern.group - k)).unflatten(-1, (count, pattern.group))
    out = values.new_zeros((*values.shape[:-1], pattern.expanded(k)))
    even, odd = count * pattern.even, count * pattern.odd
    out[..., :even] = groups[..., : pattern.even].flatten(-2)
    start = pattern.odd_start(k)
    out[..., start : start + odd] = groups[..., 2 : 2 + pattern.odd].flatten(-2)
    return out
