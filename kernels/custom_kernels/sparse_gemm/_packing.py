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

Both are vectorized over rows and groups, only move bits and run on the weight's device. Arithmetic
stands for comparisons, gathers and transposes of small groups, which a CPU does one by one.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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

_WORDS = {1: (torch.int16, torch.int32), 2: (torch.int32, torch.int64)}
"""Integer dtypes for two and for four values, by item size."""

_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Values that are processed at a time, by type of device: temporaries take about ten bytes for
each, which on a CPU should stay in its caches."""


def decompose(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """weight [N, K], any integer or floating dtype, into the expanded weight [N, K'].

    At most two of every four consecutive values of the result are nonzero, none is −0.0, and for
    every x ``expand(x) · result[n] == x · weight[n]``, term by term. It is ``weight`` itself where
    nothing has to be changed: 2:4, K = K', and no −0.0.

    Raises ValueError with the first row and group that violate the pattern.
    """
    rows, k = weight.shape
    bits = weight.view(BITS[weight.dtype.itemsize])
    if pattern.n == 2 and bits.dtype.itemsize in _WORDS:  # the only window of a group is the group
        return _checked(weight, pattern)
    out = bits.new_empty((rows, pattern.expanded(k)))
    count = pattern.groups(k)
    even, odd, start = count * pattern.even, count * pattern.odd, pattern.odd_start(k)

    def work(part: slice) -> None:
        groups = _padded(bits[part], pattern.group).view(-1, pattern.group)
        values = groups.new_empty(pattern.group, len(groups))  # a row for each place in a group
        for place, column in zip(values, groups.unbind(1), strict=True):
            place.copy_(column)
        left = _nonzero(values, weight.dtype)
        _check_pattern(left.sum(0, dtype=torch.uint8), pattern, part.start, k)
        out[part, even:start] = 0
        out[part, start + odd :] = 0
        sections = [
            out[part, begin : begin + length].unflatten(1, (count, -1))
            for begin, length in ((0, even), (start, odd))
        ]
        for j in range(pattern.n - 1):
            first, second = left[2 * j : 2 * j + 2], left[2 * j + 2 : 2 * j + 4]
            free = 2 - first[0] - first[1]
            taken = [torch.minimum(second[0], free)]
            taken.append(torch.minimum(second[1], free - taken[0]))
            for i, mask in enumerate((*first, *taken)):
                place = sections[j % 2][:, :, j // 2 * 4 + i]
                place.copy_((values[2 * j + i] * mask).view(place.shape))
            second[0] -= taken[0]
            second[1] -= taken[1]

    _in_parts(work, bits.device, rows, out.shape[1])
    return out.view(weight.dtype)


def _checked(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """``decompose`` for 2:4, 8 or 16 bits."""
    rows, k = weight.shape
    bits = weight.view(BITS[weight.dtype.itemsize])
    signed = weight.view(torch.int8 if weight.dtype.itemsize == 1 else torch.int16)
    negative_zero = torch.iinfo(signed.dtype).min
    lowest: list[int] = []

    def check(part: slice) -> None:
        nonzero = _nonzero(_padded(bits[part], 4), weight.dtype)
        _check_pattern(_counts(nonzero).flatten(), pattern, part.start, k)
        if weight.dtype.is_floating_point and signed[part].numel():
            lowest.append(int(signed[part].min()))

    def copy(part: slice) -> None:
        torch.mul(bits[part], _nonzero(bits[part], weight.dtype), out=out[part, :k])

    _in_parts(check, bits.device, rows, k)
    if k == pattern.expanded(k) and negative_zero not in lowest:
        return weight
    out = bits.new_zeros((rows, pattern.expanded(k)))
    _in_parts(copy, bits.device, rows, k)
    return out.view(weight.dtype)


def halves(weight: torch.Tensor) -> torch.Tensor:
    """Which rows of a mixed weight [N, K] are multiplied as 2:4 ones and which as dense ones.

    Returns [ceil(N / 128), 16] uint8: for each block of 128 rows the numbers of its groups of 8
    rows, first of 8 that are 2:4, then of the others. Rows beyond the last count as zeros.

    Raises ValueError with the first row and group that violate the pattern.
    """
    n, k = weight.shape
    full = torch.zeros(-(-n // MIXED_ROWS) * MIXED_ROWS, dtype=torch.bool, device=weight.device)

    def counts(part: slice) -> torch.Tensor:
        return _counts(_nonzero(_padded(weight[part].view(torch.uint8), 4), weight.dtype))

    def work(part: slice) -> None:
        full[part] = counts(part).amax(1) > 2

    _in_parts(work, weight.device, n, k)
    dense = full.view(-1, MIXED_ROWS // MIXED_GROUP, MIXED_GROUP).any(-1)
    most = dense.shape[1] // 2
    wrong = dense.sum(1) > most
    if wrong.any():
        block = int(wrong.nonzero()[0])
        group = int(dense[block].nonzero()[most])
        first = block * MIXED_ROWS + group * MIXED_GROUP
        row = first + int(full[first : first + MIXED_GROUP].nonzero()[0])
        column = 4 * int((counts(slice(row, row + 1))[0] > 2).nonzero()[0])
        raise ValueError(
            f"sparse_gemm: the weight is not mixed: of rows {block * MIXED_ROWS} to "
            f"{min((block + 1) * MIXED_ROWS, n) - 1}, {int(dense[block].sum())} groups of "
            f"{MIXED_GROUP} rows are not 2:4, {most} are allowed; the first too many has row "
            f"{row}, group {column // 4} (columns {column} to {min(column + 4, k) - 1})"
        )
    return dense.to(torch.uint8).argsort(dim=1, stable=True).to(torch.uint8)


def pad_bits(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """weight [N, K] of any dtype with ``columns`` more columns of zeros, or itself."""
    if not columns:
        return weight
    return pad(weight.view(BITS[weight.dtype.itemsize]), (0, columns)).view(weight.dtype)


def compress(expanded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """expanded [N, K'] of 8 or 16 bits with at most two nonzeros in every aligned four, K' a
    multiple of 64.

    Returns values [N, K'/2] of its dtype and metadata [N, K'/8] uint8.
    """
    rows, k = expanded.shape
    size, device = expanded.dtype.itemsize, expanded.device
    two, four = _WORDS[size]
    lane = 8 * size
    bits = expanded.view(BITS[size])
    values = torch.empty((rows, k // 4), dtype=two, device=device)
    metadata = torch.empty((rows, k // 8), dtype=torch.uint8, device=device)
    places = torch.tensor([a | b << 2 for a, b in map(_kept, range(16))], dtype=four, device=device)

    def work(part: slice) -> None:
        code = _nonzero(bits[part], expanded.dtype).view(four)  # a bit in each of four lanes
        code |= code >> (lane - 1)
        code |= code >> 2 * (lane - 1)
        code &= 15
        nibbles = places.index_select(0, code.flatten()).view(code.shape)
        quads, mask = bits[part].view(four), (1 << lane) - 1
        first = quads >> (nibbles & 3) * lane & mask
        second = quads >> (nibbles >> 2) * lane & mask
        values[part] = second << lane | first
        pairs = nibbles.to(torch.uint8).view(torch.int16)
        metadata[part] = (pairs | pairs >> 4).to(torch.uint8)

    _in_parts(work, device, rows, k)
    return values.view(expanded.dtype), metadata


def _kept(code: int) -> tuple[int, int]:
    """The two positions kept of four; bit i of ``code`` says that value i is not zero."""
    first, second = sorted(sorted(range(4), key=lambda i: not code >> i & 1)[:2])
    return first, second


def _padded(bits: torch.Tensor, group: int) -> torch.Tensor:
    """bits [N, K] with columns of zeros up to whole groups, or itself."""
    return pad_bits(bits, -bits.shape[1] % group)


def _nonzero(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """1 where the bits of a value of ``dtype`` are not zero, else 0; −0.0 is zero."""
    if dtype.is_floating_point:
        return (bits & (1 << 8 * dtype.itemsize - 1) - 1).clamp_(max=1)
    return bits.clamp(max=1) if bits.dtype == torch.uint8 else (bits != 0).to(bits.dtype)


def _counts(nonzero: torch.Tensor) -> torch.Tensor:
    """[N, K/4] integers: the sums of every four of nonzero [N, K], 0 or 1 in 8 or 16 bits."""
    bits = 8 * nonzero.dtype.itemsize
    ones = sum(1 << bits * i for i in range(4))  # by which times a quad the top one is the sum
    return (nonzero.view(_WORDS[nonzero.dtype.itemsize][1]) * ones).__irshift__(3 * bits)


def _check_pattern(counts: torch.Tensor, pattern: Pattern, row_offset: int, k: int) -> None:
    """counts [rows · groups] of nonzeros, the first of row ``row_offset`` of the weight."""
    if not counts.numel() or counts.max() <= pattern.nonzeros:
        return
    wrong = int((counts > pattern.nonzeros).nonzero()[0])
    row, group = divmod(wrong, pattern.groups(k))
    first = group * pattern.group
    last = min(first + pattern.group, k) - 1
    raise ValueError(
        f"sparse_gemm: the weight is not {pattern}: row {row_offset + row}, group {group} (columns "
        f"{first} to {last}) has {int(counts[wrong])} nonzeros, {pattern.nonzeros} are allowed"
    )


def _in_parts(work: Callable[[slice], None], device: torch.device, rows: int, columns: int) -> None:
    """Call ``work`` for parts of the rows, which together are all of them.

    On a CPU in several threads, each of which computes alone: so they wait for each other once, and
    not after every operation, which takes long where something else runs as well.
    """
    step = max(1, _CHUNK[device.type] // max(columns, 1))
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    threads = torch.get_num_threads()
    if device.type != "cpu" or len(parts) == 1 or threads == 1:
        for part in parts:
            work(part)
        return
    inference = torch.is_inference_mode_enabled()

    def one(part: slice) -> None:
        with torch.inference_mode(inference):
            work(part)

    try:
        with ThreadPoolExecutor(threads, "pack", torch.set_num_threads, (1,)) as pool:
            list(pool.map(one, parts))  # raises what the first part raised that did
    finally:
        torch.set_num_threads(threads)  # threads that start later begin with what was set last
