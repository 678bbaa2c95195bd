# SPDX-License-Identifier: Apache-2.0
"""The half of the CUTLASS backend that decides: how the weight lies in memory, and which tile runs
a shape."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from custom_kernels import build
from custom_kernels.sparse_gemm import _packing

DTYPES = (torch.float8_e4m3fn, torch.int8, torch.bfloat16)

ROW_ALIGNMENT = 8
"""Elements of y: rows start at a multiple of 16 bytes, as the copy engine wants it."""

WHOLE, SHARED, MEDIUM, SMALL = "whole", "shared", "medium", "small"

TILES = {
    torch.float8_e4m3fn: (WHOLE, SHARED, MEDIUM, SMALL),
    torch.int8: (WHOLE, SHARED, MEDIUM, SMALL),
    torch.bfloat16: (WHOLE, SHARED, SMALL),
}
"""The tiles of each dtype, numbered as in the compiled half."""

_PLAIN = 0x44
"""Metadata of padding: the first two of every four, the value that says so of eight zeros."""


class Choice(NamedTuple):
    """A tile's number and the order of tiles, as the compiled half takes them."""

    tile: int
    swizzle: int = 1
    """Tiles of tokens that are computed next to each other before the next features' turn."""
    raster: int = 0


class Cost(NamedTuple):
    """Microseconds that a tile takes, measured on an H200: ``start`` once, and for every wave of
    tiles ``wave``; each of them plus as much per 128 bytes of K' as the second number says."""

    features: int
    tokens: int
    start: tuple[float, float]
    wave: tuple[float, float]


COSTS = {
    WHOLE: Cost(128, 256, (0.0, 0.0), (5.7, 0.405)),
    SHARED: Cost(128, 256, (12.0, 0.12), (5.7, 0.405)),
    MEDIUM: Cost(128, 128, (0.0, 0.0), (4.5, 0.275)),
    SMALL: Cost(64, 32, (3.4, 0.0), (0.7, 0.1)),
}
"""Within about a tenth of what was measured with N from 3584 to 37888, K 3584 and 18944 and M from
1 to 4096. SHARED has no last, not full wave: it shares that one out along K, and pays for adding
the parts."""


def storage(expanded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [N, K'/2] and metadata, reordered as CUTLASS's main loop loads it, of the expanded
    weight [N, K']. On the weight's device; compiles the kernels first if need be."""
    values, metadata = _packing.compress(expanded)
    return values, arrange(metadata, 8 * expanded.dtype.itemsize)


def arrange(metadata: torch.Tensor, bits: int) -> torch.Tensor:
    """metadata [N, K'/8] of values of ``bits`` in CUTLASS's order: one dimension, padded to whole
    atoms.

    An atom is a block of rows and columns whose bytes are permuted; atoms lie one below the other,
    then side by side. The permutation is CUTLASS's own.
    """
    order = _atom(bits).to(metadata.device)
    atom_rows, atom_bytes = order.shape
    rows, columns = metadata.shape
    whole = pad(metadata, (0, -columns % atom_bytes, 0, -rows % atom_rows), value=_PLAIN)
    atoms = whole.unflatten(1, (-1, atom_bytes)).unflatten(0, (-1, atom_rows)).permute(2, 0, 1, 3)
    out = torch.empty_like(atoms, memory_format=torch.contiguous_format).view(-1, order.numel())
    out[:, order.flatten()] = atoms.flatten(2).flatten(0, 1)
    return out.flatten()


@functools.cache
def _atom(bits: int) -> torch.Tensor:
    """Where each byte of an atom goes, [rows, bytes]. The atom is as large as the metadata of a
    weight of one value."""
    library = build.load("sparse_gemm", "cutlass", _any_device())
    single = torch.empty((1, 1), dtype=torch.int64)
    size = library.metadata_offsets(single, bits)
    rows = 64  # one sparse wgmma
    offsets = torch.empty((rows, size // rows), dtype=torch.int64)
    if library.metadata_offsets(offsets, bits) != size:
        raise AssertionError(f"the metadata's atom is not {rows} rows of {size // rows} bytes")
    return offsets


def run(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    values: torch.Tensor,
    metadata: torch.Tensor,
    w_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    features: int,
) -> torch.Tensor:
    """a [M, K'] contiguous, values and metadata from ``storage``; returns [M, N] bfloat16.

    Asynchronous on the current stream, one kernel; where N is not a multiple of 8, a copy after it.
    """
    m = a.shape[0]
    stride = -(-features // ROW_ALIGNMENT) * ROW_ALIGNMENT
    out = a.new_empty((m, stride), dtype=torch.bfloat16)
    y = out if stride == features else out[:, :features]
    choice = choose(a.dtype, m, features, a.shape[1], _multiprocessors(a.device))
    _library(a.device).run(a, a_scale, values, metadata, w_scale, bias, y, *choice)
    return y if stride == features else y.contiguous()


@functools.lru_cache(maxsize=4096)
def choose(dtype: torch.dtype, m: int, n: int, k: int, multiprocessors: int) -> Choice:
    """The tile that should take the least time for a [M, K'], W [N, K']."""
    steps = k * dtype.itemsize / 128

    def microseconds(tile: str) -> float:
        cost = COSTS[tile]
        waves = -(-n // cost.features) * -(-m // cost.tokens) / multiprocessors
        (start, start_step), (wave, wave_step) = cost.start, cost.wave
        count = waves if tile == SHARED else math.ceil(waves)
        return start + start_step * steps + count * (wave + wave_step * steps)

    tile = min(TILES[dtype], key=microseconds)
    # Blocks that run at the same time share operands in L2: with many features, a wave should not
    # be a single row of them.
    swizzle = 1
    if m >= 8 * COSTS[tile].tokens:
        swizzle = 4 if n >= 16384 else 2
    return Choice(TILES[dtype].index(tile), swizzle)


@functools.cache
def _library(device: torch.device) -> Any:
    return build.load("sparse_gemm", "cutlass", device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _any_device() -> torch.device | None:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
