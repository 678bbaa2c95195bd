# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding in plain torch: at torch's own speed, and exactly.

For pair i of every head, with cos and sin of the token's position::

    a' = a · cos[i] - b · sin[i]
    b' = b · cos[i] + a · sin[i]

Tests and benchmarks compare every backend with ``exact``; ``run`` rounds once and is the backend of
vLLM's engine on the CPU.
"""

import torch


def run(
    query: torch.Tensor,
    key: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    is_neox: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query and key [M, heads · head_size]; returns both, the key empty without one."""
    angles = cos_sin_cache.index_select(0, positions).float().unsqueeze(1).chunk(2, -1)
    rotated = _rotate(query, angles, head_size, is_neox)
    if key is None:
        return rotated, query.new_empty(0)
    return rotated, _rotate(key, angles, head_size, is_neox)


def exact(
    query: torch.Tensor,
    key: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    is_neox: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64, not rounded: the one definition of what is right."""
    angles = cos_sin_cache.index_select(0, positions).double().unsqueeze(1).chunk(2, -1)
    rotated = _rotate(query.double(), angles, head_size, is_neox)
    if key is None:
        return rotated, rotated.new_empty(0)
    return rotated, _rotate(key.double(), angles, head_size, is_neox)


def _rotate(
    rows: torch.Tensor, angles: tuple[torch.Tensor, ...], head_size: int, is_neox: bool
) -> torch.Tensor:
    """rows [M, heads · head_size] of any row stride, angles [M, 1, rotary_dim / 2] each; new."""
    cos, sin = angles
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    old, new = (one.unflatten(1, (-1, head_size)) for one in (rows, out))
    half = cos.shape[-1]
    if is_neox:
        pair = (slice(half), slice(half, 2 * half))
    else:
        pair = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    a, b = (old[..., place] for place in pair)
    # Products of what is not float32 become it; the assignment rounds.
    new[..., pair[0]] = torch.addcmul(a * cos, b, sin, value=-1)
    new[..., pair[1]] = torch.addcmul(b * cos, a, sin)
    if 2 * half < head_size:
        new[..., 2 * half :] = old[..., 2 * half :]
    return out
