# SPDX-License-Identifier: Apache-2.0
"""Attention of one query per sequence to a paged cache in plain torch: at torch's own speed, and
exactly.

For sequence b of length L, whose keys and values are k[0] ... k[L-1] and v[0] ... v[L-1], and for
each of its query heads q::

    y = sum over t of softmax(scale · q · k[t]) · v[t]

Tests and benchmarks compare every backend with ``exact``; ``run`` is the backend of vLLM's engine
on the CPU.
"""

import torch


def run(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """query [B, Hq, D], pages [P, page, Hkv, D]; returns y [B, Hq, D]. All pages of the table are
    gathered; on a GPU nothing waits for the device."""
    page, kv_heads = key_pages.shape[1:3]
    if lengths.device.type == "cpu":  # where the longest is known
        block_table = block_table[:, : -(-int(lengths.max()) // page)]
    inside = torch.arange(block_table.shape[1] * page, device=query.device) < lengths[:, None]
    # What is behind the end may be any number: pages that do not exist, values that are NaN.
    table = block_table.where(inside[:, ::page], 0)
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, values = (pages[table].flatten(1, 2).to(wide) for pages in (key_pages, value_pages))
    heads = query.unflatten(1, (kv_heads, -1)).to(wide)  # those that share a key and value
    scores = torch.einsum("bhgd,bthd->bhgt", heads, keys) * scale
    hidden = ~inside[:, None, None, :]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)
    values = values.masked_fill(~inside[:, :, None, None], 0)
    return torch.einsum("bhgt,bthd->bhgd", weights, values).flatten(1, 2).to(query.dtype)


def exact(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The same in float64, not rounded: the one definition of what is right. Sequence by sequence,
    so that no more than one is held in float64."""
    page = key_pages.shape[1]
    y = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    for one, length in enumerate(lengths.tolist()):
        if length:
            table = block_table[one, : -(-length // page)].long()
            y[one] = run(
                query[one : one + 1].double(),
                key_pages[table].double(),
                value_pages[table].double(),
                torch.arange(len(table), device=query.device)[None],
                lengths[one : one + 1],
                scale,
            )[0]
    return y
