# SPDX-License-Identifier: Apache-2.0
"""Rows as the kernels read them."""

import torch


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as [M, K] with unit inner stride and rows that do not overlap."""
    k = x.shape[-1]
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    if (k > 1 and rows.stride(1) != 1) or (rows.shape[0] > 1 and rows.stride(0) < k):
        return rows.contiguous()
    return rows
