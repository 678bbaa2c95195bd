# SPDX-License-Identifier: Apache-2.0
"""Symmetric quantization to 8 bits, a scale per row, in plain torch: the definition, bit for bit.

For every row of x, in float32 with IEEE divisions::

    amax = max_k |x[k]|
    inv, scale = qmax / amax, amax / qmax
    q[k] = x[k] * inv, clamped to ±qmax, rounded to nearest even into the output's dtype

with qmax 127 for int8 and 448 for float8_e4m3fn. Where the product x[k] * inv is not a number, q is
0: so a row of zeros has q 0 and scale 0. A row with an infinity or a NaN has q 0 and scale NaN, so
that whatever is computed with it is visibly NaN.
"""

import math

import torch

QMAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest quantized value of each output dtype."""


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """q [M, K] of ``dtype`` and scale [M] float32, not expanded."""
    values = x.float()
    # As integers, positive floats have the same order, and a NaN is above all.
    bits = x.view(torch.int16) if x.dtype.itemsize == 2 else values.view(torch.int32)
    amax = (bits & torch.iinfo(bits.dtype).max).amax(-1)
    amax = amax.view(x.dtype if x.dtype.itemsize == 2 else torch.float32).float()
    finite = amax.isfinite()
    # A tensor and not a number: torch divides a number by a tensor, and on GPUs a tensor by a
    # number, by way of a rounded reciprocal.
    qmax = torch.full_like(amax, QMAX[dtype])
    inv = (qmax / amax).where(finite, torch.nan)
    product = values * inv.unsqueeze(-1)
    # Otherwise rounding alone takes it beyond ±qmax, and rounding into the dtype takes it back. (To
    # ask a GPU would mean to wait for it.)
    if product.is_cuda or not math.isfinite(inv.sum()):
        product.clamp_(-QMAX[dtype], QMAX[dtype]).nan_to_num_(0.0)
    if dtype == torch.int8:
        product.round_()
    return product.to(dtype), (amax / qmax).where(finite, torch.nan)
