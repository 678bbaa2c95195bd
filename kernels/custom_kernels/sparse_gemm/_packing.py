# SPDX-License-Identifier: Apache-2.0
"""Window decomposition and 2:4 compression of a (2N-2):2N sparse weight.

**Decomposition.** Every nonzero of a group goes to exactly one of the two windows that hold its
pair, such that no window gets more than two (``custom_kernels.sparsity`` says what windows are and
how the expanded row is laid out). From left to right, window j takes what is left of its first
pair, then from its second pair until it is full. This always succeeds for at most 2N-2 nonzeros:

- a pair holds at most two, so window j takes all that is left of pair j, and only of the last pair
  can anything remain;
- a window that is not full has taken all of its second pair; so has then the next one, for which
  two places are free for the two of its second pair, and so on to the last: nothing remains;
- so if something remains, all N-1 windows are full, and there were more than 2N-2 nonzeros.

**Compression.** Of every four values of the expanded row two are kept, including all nonzeros.
Four bits hold their positions, two bits each, the first in the low bits; a byte holds two such
groups, the first in the low bits.

Both are vectorized over rows and groups, only move bits and run on the weight's device.
"""

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from custom_kernels.sparsity import MIXED_GROUP, MIXED_ROWS, Pattern

Arguments = tuple[
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    int,
]
"""Arguments of the operation's op, and of each backend's ``run``:

- a [..., K'], contiguous [M, K'] in ``run``;
- a_scale [...] float32, or None for bfloat16;
- values and metadata, from the backend's ``storage``;
- w_scale [N] float32, or None for bfloat16;
- bias [N] bfloat16, or None;
- features: N.
"""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype by item size, to move values: not every torch operation supports 8-bit floats."""

_CHUNK = 1 << 25
"""Values that are processed at a time: temporaries take about ten bytes for each."""


def decompose(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """weight [N, K], any integer or floating dtype, into the expanded weight [N, K'].

    At most two of every four consecutive values of the result are nonzero, and for every x
    ``expand(x) · result[n] == x · weight[n]``, term by term.

    Raises ValueError with the first row and group that violate the pattern.
    """
    rows, k = weight.shape
    bits = weight.view(BITS[weight.dtype.itemsize])
    out = bits.new_zeros((rows, pattern.expanded(k)))
    count = pattern.groups(k)
    even, odd, start = count * pattern.even, count * pattern.odd, pattern.odd_start(k)
    for part in _chunks(rows, out.shape[1]):
        padding = (0, count * pattern.group - k)
        values = pad(bits[part], padding).unflatten(1, (count, pattern.n, 2))
        left = pad(_nonzero(weight[part]), padding).unflatten(1, (count, pattern.n, 2))
        _check_pattern(left, pattern, part.start, k)
        windows = []
        for j in range(pattern.n - 1):
            first, second = left[:, :, j], left[:, :, j + 1]
            # A value is taken if those before it leave one of the window's two places.
            before = torch.stack([first.sum(-1), first.sum(-1) + second[..., 0]], -1)
            taken = second & (before < 2)
            window = torch.cat([values[:, :, j] * first, values[:, :, j + 1] * taken], -1)
            windows.append(window)
            left[:, :, j + 1] = second & ~taken
        stacked = torch.stack(windows, 2)  # [rows, groups, N-1, 4]
        out[part, :even] = stacked[:, :, 0::2].flatten(1)
        out[part, start : start + odd] = stacked[:, :, 1::2].flatten(1)
    return out.view(weight.dtype)


def halves(weight: torch.Tensor) -> torch.Tensor:
    """Which rows of a mixed weight [N, K] are multiplied as 2:4 ones and which as dense ones.

    Returns [ceil(N / 128), 16] uint8: for each block of 128 rows the numbers of its groups of 8
    rows, first of 8 that are 2:4, then of the others. Rows beyond the last count as zeros.

    Raises ValueError with the first row and group that violate the pattern.
    """
    n, k = weight.shape
    full = torch.zeros(-(-n // MIXED_ROWS) * MIXED_ROWS, dtype=torch.int64, device=weight.device)
    for part in _chunks(n, k):  # the first of each row's groups of 4 that is too full, or -1
        nonzero = pad(_nonzero(weight[part]), (0, -k % 4)).unflatten(1, (-1, 4))
        over = nonzero.sum(-1, dtype=torch.uint8) > 2
        full[part] = over.any(1) * (over.to(torch.uint8).argmax(1) + 1)
    dense = full.view(-1, MIXED_ROWS // MIXED_GROUP, MIXED_GROUP).any(-1)
    most = dense.shape[1] // 2
    wrong = dense.sum(1) > most
    if wrong.any():
        block = int(wrong.nonzero()[0])
        group = int(dense[block].nonzero()[most])
        first = block * MIXED_ROWS + group * MIXED_GROUP
        row = first + int(full[first : first + MIXED_GROUP].nonzero()[0])
        column = (int(full[row]) - 1) * 4
        raise ValueError(
            f"sparse_gemm: the weight is not mixed: of rows {block * MIXED_ROWS} to "
            f"{min((block + 1) * MIXED_ROWS, n) - 1}, {int(dense[block].sum())} groups of "
            f"{MIXED_GROUP} rows are not 2:4, {most} are allowed; the first too many has row "
            f"{row}, group {column // 4} (columns {column} to {min(column + 4, k) - 1})"
        )
    return dense.to(torch.uint8).argsort(dim=1, stable=True).to(torch.uint8)


def pad_bits(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """weight [N, K] of any dtype with ``columns`` more columns of zeros."""
    return pad(weight.view(BITS[weight.dtype.itemsize]), (0, columns)).view(weight.dtype)


def compress(expanded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """expanded [N, K'] with at most two nonzeros in every aligned four, K' a multiple of 64.

    Returns values [N, K'/2] of its dtype and metadata [N, K'/8] uint8.
    """
    rows, k = expanded.shape
    bits = expanded.view(BITS[expanded.dtype.itemsize])
    values = bits.new_empty((rows, k // 2))
    metadata = torch.empty((rows, k // 8), dtype=torch.uint8, device=expanded.device)
    kept = torch.tensor([_kept(code) for code in range(16)], device=expanded.device)
    weights = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=expanded.device)
    for part in _chunks(rows, k):
        code = (_nonzero(expanded[part]).unflatten(1, (-1, 4)) * weights).sum(-1, dtype=torch.int64)
        places = kept[code]  # [rows, K'/4, 2]
        values[part] = bits[part].unflatten(1, (-1, 4)).gather(2, places).flatten(1)
        nibbles = (places[..., 0] | places[..., 1] << 2).to(torch.uint8).unflatten(1, (-1, 2))
        metadata[part] = nibbles[..., 0] | nibbles[..., 1] << 4
    return values.view(expanded.dtype), metadata


def decompress(values: torch.Tensor, metadata: torch.Tensor) -> torch.Tensor:
    """The inverse of ``compress``: [N, K'] from values [N, K'/2] and metadata [N, K'/8]."""
    rows, half = values.shape
    nibbles = torch.stack([metadata & 15, metadata >> 4], -1).flatten(1)
    places = torch.stack([nibbles & 3, nibbles >> 2], -1).long()  # [rows, K'/4, 2]
    bits = values.view(BITS[values.dtype.itemsize])
    out = bits.new_zeros((rows, half // 2, 4))
    out.scatter_(2, places, bits.unflatten(1, (half // 2, 2)))
    return out.flatten(1).view(values.dtype)


def _kept(code: int) -> tuple[int, int]:
    """The two positions kept of four; bit i of ``code`` says that value i is not zero."""
    first, second = sorted(sorted(range(4), key=lambda i: not code >> i & 1)[:2])
    return first, second


def _nonzero(values: torch.Tensor) -> torch.Tensor:
    if values.is_floating_point() and values.dtype.itemsize == 1:
        return (values.view(torch.uint8) & 0x7F) != 0
    return values != 0


def _check_pattern(nonzero: torch.Tensor, pattern: Pattern, row_offset: int, k: int) -> None:
    """nonzero [rows, groups, N, 2], the first of them row ``row_offset`` of the weight."""
    counts = nonzero.sum((-1, -2))
    wrong = counts > pattern.nonzeros
    if not wrong.any():
        return
    row, group = (int(index) for index in wrong.nonzero()[0])
    first = group * pattern.group
    last = min(first + pattern.group, k) - 1
    raise ValueError(
        f"sparse_gemm: the weight is not {pattern}: row {row_offset + row}, group {group} (columns "
        f"{first} to {last}) has {int(counts[row, group])} nonzeros, {pattern.nonzeros} are allowed"
    )


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
