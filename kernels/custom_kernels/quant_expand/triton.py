# SPDX-License-Identifier: Apache-2.0
"""q, scale = per-token quantization of x, expanded for a (2N-2):2N pattern, in Triton.

    x [M, K] bfloat16 or float16, unit inner stride; q [M, K'] int8 or float8_e4m3fn;
    scale [M] float32. What is right is in reference.py, bit for bit; the order of a row of q in
    custom_kernels.sparsity.

A program has a row. It stays in registers between the maximum and the quantization where it fits,
else it is read twice. Where something is expanded, registers hold pairs of values, one tensor for
each of the N pairs of a group: window j of a group is then its quantized pairs j and j+1 side by
side in one 32-bit word, and nothing is gathered.
"""

import dataclasses
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

from custom_kernels import quantization, sparsity
from custom_kernels.operation import Specialization
from custom_kernels.quant_expand import OUTPUTS, empty_output

ON_CHIP = 65536
"""Values of a row that fit in registers; longer rows are processed in blocks of this size."""


@triton.jit
def load_pair(x, pair, K, WORDS: tl.constexpr):
    """The values 2·pair and 2·pair+1 of a row side by side in a word, zeros behind its end."""
    if WORDS:
        return tl.load(x + pair, mask=2 * pair < K, other=0)
    low = tl.load(x + 2 * pair, mask=2 * pair < K, other=0).to(tl.int32) & 0xFFFF
    return low | tl.load(x + 2 * pair + 1, mask=2 * pair + 1 < K, other=0).to(tl.int32) << 16


@triton.jit
def low_value(word, BF16: tl.constexpr):
    if BF16:
        return (word << 16).to(tl.float32, bitcast=True)
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_value(word, BF16: tl.constexpr):
    if BF16:
        return (word & -65536).to(tl.float32, bitcast=True)
    return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_values(x, k, K, BF16: tl.constexpr):
    """Values k of a row in float32, zeros behind its end."""
    return low_value(tl.load(x + k, mask=k < K, other=0).to(tl.int32), BF16)


@triton.jit
def magnitude(values):
    """Bits that order like |values|, a NaN above infinity."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def encode(values, inverse, unusable, QMAX: tl.constexpr, INT8: tl.constexpr, NATIVE: tl.constexpr):
    """The quantized values as bytes, each in a word of 32 bits."""
    product = values * inverse
    zero = unusable | (product != product)
    product = tl.where(zero, 0.0, tl.minimum(tl.maximum(product, -QMAX), QMAX))
    if INT8:
        # Adding 1.5 · 2^23 rounds to an integer, to nearest even, and leaves it in the low bits.
        return (product + 12582912.0).to(tl.int32, bitcast=True) & 0xFF
    if NATIVE:
        return product.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    bits = product.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Below 2^-6 codes are multiples of 2^-9; above, 3 bits of mantissa stay of 23 and the
    # exponent's bias is 7 instead of 127. Both round to nearest even.
    small = (tl.abs(product) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    large = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    return tl.where(size < 0x3C800000, small, large) | ((bits >> 24) & 0x80)


@triton.jit
def factors(amax, scale, QMAX: tl.constexpr):
    """Write the row's scale; return 1 / scale and whether the row is to become zeros."""
    infinite = (amax.to(tl.int32, bitcast=True)) >= 0x7F800000  # or not a number
    unusable = infinite | (amax == 0.0)
    inverse = tl.div_rn(tl.full((), QMAX, tl.float32), tl.where(unusable, 1.0, amax))
    step = tl.div_rn(tl.where(infinite, 0.0, amax), tl.full((), QMAX, tl.float32))
    tl.store(scale, tl.where(infinite, float("nan"), step))
    return inverse, unusable


@triton.jit
def quantize_rows(
    x,
    q,
    scale,
    x_stride,
    K,
    END,
    BF16: tl.constexpr,
    QMAX: tl.constexpr,
    INT8: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Nothing is expanded: x in words of a value, q [M, END] in bytes. TILES · BLOCK values at a
    time."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    q += row * END
    place = tl.arange(0, BLOCK)
    if TILES > 0:
        tiles = ()
        found = tl.zeros((BLOCK,), tl.int32)
        for tile in tl.static_range(TILES):
            values = load_values(x, tile * BLOCK + place, K, BF16)
            found = tl.maximum(found, magnitude(values))
            tiles += (values,)
        amax = tl.max(found, 0).to(tl.float32, bitcast=True)
        inverse, unusable = factors(amax, scale + row, QMAX)
        for tile in tl.static_range(TILES):
            codes = encode(tiles[tile], inverse, unusable, QMAX, INT8, NATIVE)
            at = tile * BLOCK + place
            tl.store(q + at, codes.to(tl.int8), mask=at < END)
    else:
        found = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, K, BLOCK):
            found = tl.maximum(found, magnitude(load_values(x, start + place, K, BF16)))
        amax = tl.max(found, 0).to(tl.float32, bitcast=True)
        inverse, unusable = factors(amax, scale + row, QMAX)
        for start in range(0, END, BLOCK):
            values = load_values(x, start + place, K, BF16)
            codes = encode(values, inverse, unusable, QMAX, INT8, NATIVE)
            tl.store(q + start + place, codes.to(tl.int8), mask=start + place < END)


@triton.jit
def store_windows(
    q,
    group,
    words,
    inverse,
    unusable,
    ODD_START,
    ODD_END,
    N: tl.constexpr,
    FIRST: tl.constexpr,
    BF16: tl.constexpr,
    QMAX: tl.constexpr,
    INT8: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Quantize the pairs words[FIRST : FIRST + N] of every group and write its windows."""
    pairs = ()
    for j in tl.static_range(N):
        word = words[FIRST + j]
        low = encode(low_value(word, BF16), inverse, unusable, QMAX, INT8, NATIVE)
        high = encode(high_value(word, BF16), inverse, unusable, QMAX, INT8, NATIVE)
        pairs += (low | high << 8,)
    for j in tl.static_range(N - 1):
        window = pairs[j] | pairs[j + 1] << 16
        if j % 2 == 0:
            at = group * (N // 2) + j // 2
            tl.store(q + at, window, mask=at < ODD_START)
        else:
            at = ODD_START + group * ((N - 1) // 2) + j // 2
            tl.store(q + at, window, mask=at < ODD_END)


@triton.jit
def expand_rows(
    x,
    q,
    scale,
    x_stride,
    K,
    GROUPS,
    ODD_START,
    ODD_END,
    END,
    N: tl.constexpr,
    WORDS: tl.constexpr,
    BF16: tl.constexpr,
    QMAX: tl.constexpr,
    INT8: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """q [M, END] in words of a window. x and its stride in words if WORDS, else in values.
    TILES · BLOCK groups at a time; GROUPS of them cover both sections with their padding."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    q += row * END
    groups = tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.int32)
    if TILES > 0:
        words = ()
        for tile in tl.static_range(TILES):
            for j in tl.static_range(N):
                word = load_pair(x, (tile * BLOCK + groups) * N + j, K, WORDS)
                found = tl.maximum(found, magnitude(low_value(word, BF16)))
                found = tl.maximum(found, magnitude(high_value(word, BF16)))
                words += (word,)
        amax = tl.max(found, 0).to(tl.float32, bitcast=True)
        inverse, unusable = factors(amax, scale + row, QMAX)
        for tile in tl.static_range(TILES):
            # fmt: off
            store_windows(q, tile * BLOCK + groups, words, inverse, unusable, ODD_START, ODD_END,
                          N, tile * N, BF16, QMAX, INT8, NATIVE)
            # fmt: on
    else:
        for start in range(0, GROUPS, BLOCK):
            for j in tl.static_range(N):
                word = load_pair(x, (start + groups) * N + j, K, WORDS)
                found = tl.maximum(found, magnitude(low_value(word, BF16)))
                found = tl.maximum(found, magnitude(high_value(word, BF16)))
        amax = tl.max(found, 0).to(tl.float32, bitcast=True)
        inverse, unusable = factors(amax, scale + row, QMAX)
        for start in range(0, GROUPS, BLOCK):
            words = ()
            for j in tl.static_range(N):
                words += (load_pair(x, (start + groups) * N + j, K, WORDS),)
            # fmt: off
            store_windows(q, start + groups, words, inverse, unusable, ODD_START, ODD_END,
                          N, 0, BF16, QMAX, INT8, NATIVE)
            # fmt: on
    padding = ODD_END + tl.arange(0, 16)
    tl.store(q + padding, tl.zeros((16,), tl.int32), mask=padding < END)


@dataclasses.dataclass(frozen=True)
class Launch:
    """The kernel, its settings and its integer arguments."""

    kernel: Any
    numbers: tuple[int, ...]
    """The integer arguments after x_stride."""
    constants: dict[str, Any]
    num_warps: int


@functools.lru_cache(maxsize=4096)
def plan(
    k: int, pattern: str | None, bfloat16: bool, dtype: torch.dtype, words: bool, native: bool
) -> Launch:
    """The launch for rows of ``k`` values.

    Args:
        words: rows have an even number of values and start at multiples of four bytes.
        native: the device converts to e4m3.
    """
    form = sparsity.pattern(pattern) if pattern else None
    formats = {
        "BF16": bfloat16,
        "QMAX": quantization.QMAX[dtype],
        "INT8": dtype == torch.int8,
        "NATIVE": native and dtype != torch.int8,
    }
    num_warps = min(16, max(1, triton.next_power_of_2(-(-k // 1024))))
    if form is None or form.n == 2:
        end = form.expanded(k) if form else -(-k // 16) * 16
        block, tiles = _tiles(end, 1, 8)
        return Launch(
            quantize_rows, (k, end), {**formats, "BLOCK": block, "TILES": tiles}, num_warps
        )
    start, groups = form.odd_start(k), form.groups(k)
    odd = -(-groups * form.odd // 16) * 16
    cover = max(-(-start // form.even), -(-odd // form.odd))
    block, tiles = _tiles(cover, form.group, max(1, 24 // form.n))
    return Launch(
        expand_rows,
        (k, cover, start // 4, (start + odd) // 4, form.expanded(k) // 4),
        {
            "N": form.n,
            "WORDS": words,
            **formats,
            "BLOCK": block,
            "TILES": tiles,
        },
        num_warps,
    )


def run(
    x: torch.Tensor, pattern: str | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], unit inner stride; returns q [M, K'] and scale [M]."""
    q, scale = empty_output(x, pattern, dtype)
    rows, k = x.shape
    stride = x.stride(0) if rows > 1 else k
    words = k % 2 == 0 and stride % 2 == 0 and x.data_ptr() % 4 == 0
    launch = plan(k, pattern, x.dtype == torch.bfloat16, dtype, words, _native(x.device))
    if launch.kernel is quantize_rows:
        source, target = x.view(torch.int16), q.view(torch.int8)
    else:
        # Flat views: one of words needs a width that is a multiple of two.
        source = x.as_strided(((rows - 1) * stride + k,), (1,)).view(
            torch.int32 if words else torch.int16
        )
        target = q.view(torch.int32)
        stride = stride // 2 if words else stride
    with torch.cuda.device_of(x):
        launch.kernel[(rows,)](
            source,
            target,
            scale,
            stride,
            *launch.numbers,
            **launch.constants,
            num_warps=launch.num_warps,
        )
    return q, scale


def specializations() -> list[Specialization]:
    """A row of 3584 values in the usual patterns, and one of 18944."""
    from custom_kernels.compile.sources import pinned_architectures

    pinned = pinned_architectures()
    able = tuple(name for name in pinned if float(name.rstrip("af")) >= 8.9)
    unable = tuple(name for name in pinned if name not in able)
    int8, fp8 = OUTPUTS
    found: list[Specialization] = []
    for pattern in (None, "4:6", "6:8", "8:10"):
        found += [
            _specialization(3584, pattern, int8, False, pinned),
            _specialization(3584, pattern, fp8, True, able),
        ]
    found.append(_specialization(18944, "6:8", int8, False, pinned))
    found.append(_specialization(18944, None, fp8, True, able))
    if unable:
        found.append(_specialization(3584, "6:8", fp8, False, unable))
    return found


def _specialization(
    k: int, pattern: str | None, dtype: torch.dtype, native: bool, architectures: tuple[str, ...]
) -> Specialization:
    launch = plan(k, pattern, True, dtype, True, native)
    plain = launch.kernel is quantize_rows
    first = launch.kernel.arg_names.index("K")
    numbers = dict(zip(launch.kernel.arg_names[first:], launch.numbers, strict=False))
    return Specialization(
        launch.kernel,
        {
            "x": "*i16" if plain else "*i32",
            "q": "*i8" if plain else "*i32",
            "scale": "*fp32",
            "x_stride": "i32",
            **dict.fromkeys(numbers, "i32"),
        },
        launch.constants,
        num_warps=launch.num_warps,
        label=f"K {k}, {pattern or 'plain'}, {str(dtype).removeprefix('torch.')}",
        aligned=(
            *("x", "q", "scale", "x_stride"),
            *(name for name, value in numbers.items() if value % 16 == 0),
        ),
        architectures=architectures,
    )


def _tiles(count: int, values: int, most: int) -> tuple[int, int]:
    """Block and number of tiles that cover ``count`` units of ``values`` values with the least
    excess, in at most ``most`` tiles; 0 tiles if they do not fit in registers."""
    if count * values > ON_CHIP:
        return max(16, triton.next_power_of_2(ON_CHIP // values // 8)), 0
    choices = [
        (tiles * block, tiles, block)
        for tiles in range(1, most + 1)
        for block in [max(16, triton.next_power_of_2(-(-count // tiles)))]
    ]
    _, tiles, block = min(choices)
    return block, tiles


@functools.cache
def _native(device: torch.device) -> bool:
    """Whether Triton converts to e4m3, else integer operations do: GPUs before 8.9 cannot, and the
    interpreter is wrong for subnormals and for values that round up to a power of two."""
    return (
        device.type == "cuda"
        and not knobs.runtime.interpret
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )
