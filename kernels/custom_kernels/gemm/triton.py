# SPDX-License-Identifier: Apache-2.0
"""y = x · Wᵀ + b in Triton: one persistent kernel, and one that adds the parts of a split K.

    x [M, K], W [N, K], b [N] or none, y [M, N], all bfloat16 or all float16; sums in float32,
    rounded once.

A program walks over tiles of y (or over parts of them along K) with a stride of the number of
programs, which is what fits on the device at once. Tiles of x and W come through TMA descriptors
where the device has TMA and rows start at multiples of 16 bytes, else through pointers with masks.
With few tokens the product is formed the other way round, yᵀ = W · xᵀ: the tensor cores want 64
rows or more on one side and are content with 16 on the other, and it is W that has them.

With few tiles K is split: parts are written in float32 and added by the second kernel in a fixed
order, so that the same call on the same device always gives the same bits.

The idea of the persistent loop and its order of tiles follows Triton's tutorial on persistent
matrix multiplication; the split follows the usual "split-K with a reduction pass".
"""

# spills: a few words on 12.0a, where neither tiles nor warps were chosen by measurement

import dataclasses
import functools
import logging
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from custom_kernels import tuned
from custom_kernels.operation import Specialization

DTYPES = (torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)
"""Its kernels for bfloat16 need it."""

log = logging.getLogger(__name__)

GROUP = 8
"""Tiles along M that are done one after another for the same tiles of W, which are then in L2."""

INTERPRETED = knobs.runtime.interpret
"""Triton's interpreter multiplies bfloat16 as integers, and truncates to it: there tiles become
float32 before they are multiplied, and torch rounds the result."""
COUNTS_ELEMENTS = INTERPRETED and triton.__version__.startswith("3.5.")
"""That interpreter requires strides of multiples of 16 elements, not bytes, in descriptors."""


# M changes from call to call: being 1 or a multiple of 16 must not make a kernel of its own.
@triton.jit(do_not_specialize=["M", "parts"])
def multiply(
    x,
    w,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    w_stride,
    parts,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """out is y, or with several parts [parts, M, N] in float32; then bias is None."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    steps = tl.cdiv(K, BLOCK_K)
    steps_of_part = tl.cdiv(steps, parts)
    for item in tl.range(tl.program_id(0), tiles * parts, tl.num_programs(0)):
        part = item // tiles
        tile = item % tiles
        group = tile // (GROUP * tiles_n)
        rows = min(tiles_m - group * GROUP, GROUP)
        m0 = (group * GROUP + tile % (GROUP * tiles_n) % rows) * BLOCK_M
        n0 = tile % (GROUP * tiles_n) // rows * BLOCK_N
        offsets_m = m0 + tl.arange(0, BLOCK_M)
        offsets_n = n0 + tl.arange(0, BLOCK_N)
        if not TMA:
            x_rows = x + offsets_m.to(tl.int64)[:, None] * x_stride
            w_rows = w + offsets_n.to(tl.int64)[:, None] * w_stride

        if TRANSPOSED:
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        first = part * steps_of_part
        for step in range(first, min(first + steps_of_part, steps)):
            k0 = step * BLOCK_K
            if TMA:
                x_tile = x.load([m0, k0])
                w_tile = w.load([n0, k0])
            else:
                k = k0 + tl.arange(0, BLOCK_K)
                x_inside = (offsets_m < M)[:, None] & (k < K)[None, :]
                w_inside = (offsets_n < N)[:, None] & (k < K)[None, :]
                x_tile = tl.load(x_rows + k[None, :], mask=x_inside, other=0.0)
                w_tile = tl.load(w_rows + k[None, :], mask=w_inside, other=0.0)
            if WIDEN:
                x_tile = x_tile.to(tl.float32)
                w_tile = w_tile.to(tl.float32)
            sums = tl.dot(w_tile, x_tile.T, sums) if TRANSPOSED else tl.dot(x_tile, w_tile.T, sums)
        if TRANSPOSED:
            sums = sums.T

        if HAS_BIAS:
            sums += tl.load(bias + offsets_n, mask=offsets_n < N, other=0.0).to(tl.float32)[None, :]
        to = out + (part.to(tl.int64) * M + offsets_m)[:, None] * N + offsets_n[None, :]
        inside = (offsets_m < M)[:, None] & (offsets_n < N)[None, :]
        tl.store(to, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def add_parts(
    parts,
    bias,
    y,
    M,
    N,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = parts[0] + parts[1] + ... + bias, in this order."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    sums = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT_K):
        sums += tl.load(parts + (part * M + m) * N + n, mask=inside, other=0.0)
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + m * N + n, sums.to(y.dtype.element_ty), mask=inside)


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a launch."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    transposed: bool = False
    num_warps: int = 4
    num_stages: int = 4
    programs: int = 1
    """Per SM."""

    def constants(self, tma: bool, has_bias: bool) -> dict[str, Any]:
        """The compile-time arguments of ``multiply``."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "TRANSPOSED": self.transposed,
            "TMA": tma,
            "HAS_BIAS": has_bias,
            "GROUP": GROUP,
            "WIDEN": INTERPRETED,
        }


TABLE = (
    (16, Config(16, 64, 128, transposed=True, num_warps=4, num_stages=5, programs=2)),
    (32, Config(32, 64, 128, transposed=True, num_warps=4, num_stages=4, programs=2)),
    (64, Config(64, 64, 128, transposed=True, num_warps=4, num_stages=3, programs=2)),
    (256, Config(64, 64, 128, num_warps=4, num_stages=3, programs=2)),
)
"""(largest M, how to run it without a split), measured on an H200."""
LARGE = (
    Config(128, 256, 64, num_warps=8, num_stages=3),
    Config(128, 128, 64, num_warps=4, num_stages=3, programs=2),
    Config(64, 128, 64, num_warps=4, num_stages=4, programs=2),
    Config(64, 64, 64, num_warps=4, num_stages=5, programs=2),
)
"""Beyond the table: the first whose tiles fill the device."""
SMALL_MEMORY = Config(128, 128, 32, num_warps=8, num_stages=3)
"""Where there is less shared memory than on a data-centre GPU."""

MAX_SPLIT = 16
MIN_STEPS = 2
"""A part of a split K has at least so many steps: with fewer, the pipeline never fills."""


def config(m: int, n: int, k: int, sms: int, shared: int) -> Config:
    """Tiles and split for a shape on a device with so much shared memory per block."""

    def tiles_of(fit: Config) -> int:
        return triton.cdiv(m, fit.block_m) * triton.cdiv(n, fit.block_n)

    def fills(fit: Config) -> bool:
        return tiles_of(fit) >= sms * fit.programs

    fit = next((row for largest, row in TABLE if m <= largest), None)
    if fit is None or (m > 64 and n >= 32 * sms * 4):
        fit = next(filter(fills, LARGE), LARGE[-1])
    while _shared_bytes(fit) > shared:
        fit = (
            dataclasses.replace(fit, num_stages=fit.num_stages - 1)
            if fit.num_stages > 2
            else SMALL_MEMORY
        )
    tiles = tiles_of(fit)
    slots = sms * fit.programs
    most = min(MAX_SPLIT, triton.cdiv(k, fit.block_k) // MIN_STEPS)
    # A part is written and read once more, in float32: worth it where K is long and tiles are few.
    split = max(1, min(slots // tiles, most)) if k >= 2 * n or k >= 3072 else 1
    return dataclasses.replace(fit, split_k=1 << (split.bit_length() - 1))


def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K], weight [N, K], bias [N] or None, all bfloat16 or all float16; returns [M, N] of
    that dtype. Deterministic.

    Asynchronous on the current stream. The first call with new constants compiles, a second or so:
    before a CUDA-graph capture, call once with as many rows.
    """
    (m, k), n = x.shape, weight.shape[0]
    return run_as(x, weight, bias, _config(x.device, x.dtype, m, n, k))


@functools.lru_cache(maxsize=1 << 16)
def _config(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> Config:
    """The settings tuned on this GPU, else those of the table."""
    settings = tuned.settings("gemm", "triton", device, dtype, m, N=n, K=k)
    if settings is not None:
        try:
            return Config(**settings)
        except TypeError as error:
            log.warning("gemm.triton: tuning for N=%d K=%d is ignored: %s", n, k, error)
    sms, shared, _ = _device(device)
    return config(m, n, k, sms, shared)


def run_as(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, fit: Config
) -> torch.Tensor:
    """``run`` with a given configuration."""
    (m, k), n = x.shape, weight.shape[0]
    sms, _, has_tma = _device(x.device)
    tma = has_tma and _aligned(x) and _aligned(weight)
    y = x.new_empty((m, n), dtype=torch.float32 if INTERPRETED else x.dtype)
    out = y if fit.split_k == 1 else x.new_empty((fit.split_k, m, n), dtype=torch.float32)
    items = triton.cdiv(m, fit.block_m) * triton.cdiv(n, fit.block_n) * fit.split_k
    multiply[(min(items, sms * fit.programs),)](
        TensorDescriptor(x, [m, k], [_stride(x), 1], [fit.block_m, fit.block_k]) if tma else x,
        TensorDescriptor(weight, [n, k], [_stride(weight), 1], [fit.block_n, fit.block_k])
        if tma
        else weight,
        bias if fit.split_k == 1 else None,
        out,
        m,
        n,
        k,
        _stride(x),
        _stride(weight),
        fit.split_k,
        **fit.constants(tma, bias is not None and fit.split_k == 1),
        num_warps=fit.num_warps,
        num_stages=fit.num_stages,
    )
    if fit.split_k > 1:
        block = 256
        add_parts[(triton.cdiv(n, block), m)](
            out, bias, y, m, n, fit.split_k, bias is not None, block
        )
    return y.to(x.dtype)


def specializations() -> list[Specialization]:
    """What launches at the table's limits compile: with TMA on GPUs of data centres from Hopper on
    and on those of workstations, with pointers everywhere."""
    found = []
    shapes = [(1, 896, 896), *((m, 3584, 3584) for m, _ in TABLE), (4096, 3584, 3584)]
    devices: list[tuple[tuple[str, ...], int, int, tuple[bool, ...]]] = [
        (("8.0",), 108, 166912, (False,)),
        (("9.0a", "10.0a"), 132, 232448, (True, False)),
        (("12.0a",), 170, 101376, (True, False)),
    ]
    for architectures, sms, shared, ways in devices:
        for m, n, k in shapes:
            fit = config(m, n, k, sms, shared)
            for tma in ways:
                label = f"M={m} N={n} K={k}, " + ("TMA" if tma else "pointers")
                one = _specialization(fit, torch.bfloat16, tma, label)
                found.append(dataclasses.replace(one, architectures=architectures))
    signature = {"parts": "*fp32", "bias": "*bf16", "y": "*bf16", "M": "i32", "N": "i32"}
    constants = {"SPLIT_K": 4, "HAS_BIAS": True, "BLOCK": 256}
    aligned = ("parts", "bias", "y", "N")
    found.append(Specialization(add_parts, signature, constants, label="4 parts", aligned=aligned))
    return found


def _specialization(fit: Config, dtype: torch.dtype, tma: bool, label: str) -> Specialization:
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    signature = {
        "x": f"tensordesc<{name}[{fit.block_m}, {fit.block_k}]>" if tma else f"*{name}",
        "w": f"tensordesc<{name}[{fit.block_n}, {fit.block_k}]>" if tma else f"*{name}",
        "bias": f"*{name}",
        "out": f"*{name}" if fit.split_k == 1 else "*fp32",
        **dict.fromkeys(("M", "N", "K", "x_stride", "w_stride", "parts"), "i32"),
    }
    constants = fit.constants(tma, has_bias=fit.split_k == 1)
    if fit.split_k > 1:
        del signature["bias"]
        constants["bias"] = None
    return Specialization(
        multiply,
        signature,
        constants,
        num_warps=fit.num_warps,
        num_stages=fit.num_stages,
        label=label,
        aligned=("out", "N", "K", "x_stride", "w_stride", *(() if tma else ("x", "w"))),
    )


def _shared_bytes(fit: Config) -> int:
    return fit.num_stages * fit.block_k * (fit.block_m + fit.block_n) * 2


def _stride(matrix: torch.Tensor) -> int:
    """Row stride; for a single row, any valid one."""
    return matrix.stride(0) if matrix.shape[0] > 1 else 8 * triton.cdiv(matrix.shape[1], 8)


def _aligned(matrix: torch.Tensor) -> bool:
    """Whether TMA can load it: every row starts at a multiple of 16 bytes."""
    unit = 1 if COUNTS_ELEMENTS else matrix.element_size()
    return (matrix.data_ptr() | _stride(matrix) * unit) % 16 == 0


@functools.cache
def _device(device: torch.device) -> tuple[int, int, bool]:
    """SMs, bytes of shared memory per block, whether there is TMA."""
    if device.type != "cuda":  # the interpreter, which knows descriptors
        return 2, 232448, True
    properties = torch.cuda.get_device_properties(device)
    return (
        properties.multi_processor_count,
        # torch's stub lacks it.
        properties.shared_memory_per_block_optin,  # pyrefly: ignore[missing-attribute]
        properties.major >= 9,
    )
