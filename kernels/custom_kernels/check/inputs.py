# SPDX-License-Identifier: Apache-2.0
"""What makes random inputs like activations, and puts edges into them."""

import torch


def make_outliers(least: float, most: float, *tensors: torch.Tensor) -> None:
    """Make one column in a hundred so many times as large, the same in all ``tensors`` [M, K]."""
    k, device = tensors[0].shape[1], tensors[0].device
    columns = torch.randint(k, (max(1, k // 100),), device=device)
    large = torch.empty(len(columns), device=device).uniform_(least, most)
    for tensor in tensors:
        tensor[:, columns] *= large.to(tensor.dtype)


def make_edges(x: torch.Tensor) -> None:
    """Rows of x [M, K] after the first: of zeros, with infinities, with NaN, of subnormals."""
    half = x.shape[1] // 2
    for row, value in zip(x[1:], (0.0, torch.inf, torch.nan, 1e-39), strict=False):
        row[half:] = value
        row[:half] *= 0 if value == 0 else 1e-38
