# SPDX-License-Identifier: Apache-2.0
"""The host half of the wgmma backend: the weight's layout in memory, and the tile for a shape."""

import functools
import math
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from custom_kernels import registry
from custom_kernels.sparse_gemm import _packing
from custom_kernels.sparsity import MIXED_GROUP, MIXED_ROWS

DTYPES = (torch.float8_e4m3fn, torch.int8, torch.bfloat16)

_library = functools.cache(registry.operation("sparse_gemm").backend("wgmma").library)

ROW_ALIGNMENT = 8
"""Elements of y: rows start at a multiple of 16 bytes, as TMA requires."""

ROWS = 64
"""Rows of the weight in a block: one instruction's."""

_PLAIN = 0x44
"""Metadata of eight zeros: the first two of every four are kept."""


class Choice(NamedTuple):
    """How a shape is computed: arguments of the compiled half."""

    tile: int
    """Index in ``TILES``."""
    pair: int
    """Blocks of neighbouring features that load tokens together: 1 or 2."""
    split: int
    """Blocks that split a tile along K: 1, 2 or 4. With a tile that is ``shared``, only the tiles
    of the last, partial wave are split, by at most so many."""


class Tile(NamedTuple):
    """A tile of the compiled half and the microseconds that it takes, measured on an H200."""

    features: int
    tokens: int
    per_sm: int
    """Blocks that run on an SM at the same time."""
    shared: bool
    splits: tuple[int, ...]
    start: float
    """Once,"""
    wave: float
    """for each wave of tiles,"""
    step: float
    """in each wave for every 128 bytes of K',"""
    add: float
    """and once where tiles are shared out along K."""


TILES = (
    Tile(128, 256, 1, False, (1, 2, 4), 0.4, 3.2, 0.422, 7.7),
    Tile(128, 256, 1, True, (4,), 0.0, 2.4, 0.464, 9.0),
    Tile(128, 192, 1, False, (1,), 3.5, 1.6, 0.359, 0.0),
    Tile(128, 128, 1, False, (1, 2, 4), 1.1, 2.1, 0.253, 4.7),
    Tile(128, 64, 1, False, (1, 2, 4), 0.1, 3.6, 0.167, 3.0),
    Tile(64, 32, 2, False, (1,), 0.0, 3.2, 0.126, 0.0),
    Tile(64, 16, 2, False, (1, 2), 2.4, 0.4, 0.116, 1.5),
)
"""In the order of the compiled half. With these figures ``choose`` was 1.5 % slower on average than
the fastest choice, for N from 3584 to 37888, K 3584 and 18944, and M from 1 to 16384; up to M = 64,
measured again behind quant_expand, 0.3 %."""

MIXED_TILES = (
    Tile(128, 256, 1, False, (1, 2, 4), 0.0, 4.2, 0.604, 8.9),
    Tile(128, 256, 1, True, (4,), 1.0, 2.2, 0.664, 10.9),
    Tile(128, 192, 1, False, (1,), 1.0, 3.1, 0.476, 0.0),
    Tile(128, 128, 1, False, (1, 2, 4), 0.0, 3.2, 0.345, 6.3),
    Tile(128, 64, 1, False, (1, 2, 4), 0.0, 3.4, 0.261, 4.1),
    Tile(128, 32, 1, False, (1, 2, 4), 0.0, 3.3, 0.173, 3.5),
    Tile(128, 16, 1, False, (1, 2), 1.2, 2.0, 0.155, 2.7),
)
"""The same for mixed weights, for which ``choose`` was 0.9 % slower."""

NARROWEST = min(tile.tokens for tile in TILES)
"""This tile is the fastest wherever it holds all tokens."""

MOST = {32: 64, 64: 256}
"""Tokens up to which other narrow tiles are taken, by their width: they read the weight again for
every few."""

BYTES_PER_MICROSECOND = 4.0e6
"""Bandwidth of HBM, from which the weight is read."""

PAIRS_FROM = 4096
"""Bytes of a column of a from which two blocks that load together are faster."""


def storage(expanded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The expanded weight [N, K'] as the compiled half copies it: [N / 64, K' / columns, bytes]
    uint8, padded with zeros, a block of 64 rows x 128 bytes of K' after the other; the metadata
    lies with the values. On the weight's device."""
    values, metadata = _packing.compress(expanded)
    size = expanded.dtype.itemsize
    first = columns(values.view(torch.uint8), 4)
    fill = first.shape[1] * 16 // size - metadata.shape[1]
    second = arrange(pad(metadata, (0, fill, 0, -len(values) % ROWS), value=_PLAIN), size)
    return torch.cat([first, second], 2), metadata.new_empty(0)


def mixed_storage(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A mixed weight [N, K'] of an 8-bit dtype as [N / 128, K' / columns, bytes] uint8: of every
    128 rows a block as of ``storage``, then the other 64 rows x 128 bytes, dense. And which rows
    these are: ``_packing.halves``."""
    places = _packing.halves(weight)
    bits = weight.view(torch.uint8)
    groups = pad(bits, (0, 0, 0, -len(bits) % MIXED_ROWS)).view(-1, MIXED_GROUP, bits.shape[1])
    first = torch.arange(len(places), device=weight.device)[:, None] * places.shape[1]
    sparse, dense = groups[first + places].unflatten(1, (2, -1)).unbind(1)
    compressed, _ = storage(sparse.flatten(0, 2).view(weight.dtype))
    return torch.cat([compressed, columns(dense.flatten(0, 2), 8)], 2), places


def columns(rows: torch.Tensor, count: int) -> torch.Tensor:
    """rows [N, bytes] uint8 as [N / 64, blocks, 64 x 16 x count]: blocks of ``count`` columns of 16
    bytes, which is how the instruction wants rows that are not swizzled. Padded with zeros."""
    # Two blocks more or less are one step of the smaller tiles.
    fill = (0, -rows.shape[1] % (2 * 16 * count), 0, -len(rows) % ROWS)
    blocks = pad(rows, fill).unflatten(0, (-1, ROWS)).unflatten(2, (-1, count, 16))
    return blocks.permute(0, 2, 3, 1, 4).flatten(2)


def arrange(metadata: torch.Tensor, size: int) -> torch.Tensor:
    """metadata [N, K'/8] of values of ``size`` bytes, N a multiple of 64 and K' of 128 bytes, into
    [N / 64, K' / columns, bytes]: for each of 128 threads 4 bytes for an instruction.

    Thread (warp, b, h, a), of 4 x 8 x 2 x 2, holds for 8 bit in its register of each of a block's
    two instructions 32 columns, the h-th, of row 16 warp + 8 a + b. For 16 bit it holds, for the
    h-th instruction of the two, 16 columns, the a-th, of rows 16 warp + b and 8 below.
    """
    if size == 1:
        parts = metadata.view(-1, 4, 2, 8, metadata.shape[1] // 16, 2, 2, 4)
        order = (0, 4, 1, 3, 6, 2, 5, 7)
    else:
        parts = metadata.view(-1, 4, 2, 8, metadata.shape[1] // 8, 2, 2, 2)
        order = (0, 4, 1, 3, 5, 6, 2, 7)
    return parts.permute(order).flatten(2)


def run(*arguments: *_packing.Arguments) -> torch.Tensor:
    """a [M, K'] contiguous, values from ``storage``; returns [M, N] bfloat16.

    Asynchronous on the current stream, one kernel; where N is not a multiple of 8, a copy after it.
    """
    a, a_scale, values, places, w_scale, bias, features = arguments
    m, mixed = a.shape[0], places.numel() > 0
    stride = -(-features // ROW_ALIGNMENT) * ROW_ALIGNMENT
    out = a.new_empty((m, stride), dtype=torch.bfloat16)
    y = out if stride == features else out[:, :features]
    choice = choose(a.dtype, m, features, a.shape[1], _sm_count(a.device), mixed)
    which = places if mixed else None
    _library(a.device).run(a, a_scale, values, which, w_scale, bias, y, *choice)
    return y if stride == features else y.contiguous()


@functools.lru_cache(maxsize=4096)
def choose(dtype: torch.dtype, m: int, n: int, k: int, sms: int, mixed: bool = False) -> Choice:
    """The choice with the shortest estimated time for a [M, K'], W [N, K']."""
    return min(
        (
            Choice(index, _pair(tile, m * dtype.itemsize), split)
            for index, tile in enumerate(MIXED_TILES if mixed else TILES)
            if (tile.tokens == NARROWEST) == (m <= NARROWEST) and m <= MOST.get(tile.tokens, m)
            for split in tile.splits
        ),
        key=lambda choice: _microseconds(choice, dtype, m, n, k, sms, mixed),
    )


def _pair(tile: Tile, column_bytes: int) -> int:
    return 2 if tile.tokens == 192 or (tile.tokens >= 128 and column_bytes >= PAIRS_FROM) else 1


def _microseconds(
    choice: Choice, dtype: torch.dtype, m: int, n: int, k: int, sms: int, mixed: bool
) -> tuple[float, int, int]:
    """Sort key: the estimated time, then fewer splits, then smaller tiles."""
    tile = (MIXED_TILES if mixed else TILES)[choice.tile]
    steps = k * dtype.itemsize / 128
    tiles = -(-n // (tile.features * choice.pair)) * -(-m // tile.tokens)
    at_once = sms * tile.per_sm // choice.pair
    parts = choice.split
    if tile.shared:
        whole, rest = divmod(tiles, at_once)
        if not (whole and rest):
            return math.inf, 0, 0
        parts = min(parts, at_once // rest)
        waves = whole + 1 / parts
    else:
        # Blocks that share an SM share what it can load.
        if parts > 1 and tiles * parts > (sms if tile.per_sm > 1 else 2 * at_once):
            return math.inf, 0, 0
        waves = math.ceil(tiles * parts / at_once)
        steps /= parts
    time = tile.start + waves * (tile.wave + tile.step * steps) + (tile.add if parts > 1 else 0)
    row = k / 2 * dtype.itemsize + k / 8  # with metadata
    if mixed:
        row = (row + k * dtype.itemsize) / 2
    stream = n * row / BYTES_PER_MICROSECOND + 2.5
    return max(time, stream), choice.split, tile.tokens


@functools.cache
def _sm_count(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
