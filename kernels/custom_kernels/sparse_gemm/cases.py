# SPDX-License-Identifier: Apache-2.0
"""The linear layers of real models with sparse weights, at which sparse_gemm is measured.

The whole layer is timed: x bfloat16 [M, K] is quantized, expanded and multiplied, against dense
layers that quantize and multiply. DTYPE= is that of the weight; bfloat16 is not quantized.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import linear, pad

from custom_kernels import quantization, registry, sparsity
from custom_kernels.check.baselines import vllm_kernel_missing
from custom_kernels.check.case import Case, Contender
from custom_kernels.check.models import DEFAULT_MODELS, MODELS
from custom_kernels.check.quantized import vllm_quantize
from custom_kernels.quant_expand.cases import LAYERS
from custom_kernels.sparse_gemm import SparseWeight, pack, reference, sparse_linear

__all__ = [
    "CAPTURED",
    "DEFAULT_MODELS",
    "DTYPES",
    "MODELS",
    "TOKENS",
    "baselines",
    "captured",
    "cases",
    "checks",
]

DTYPES = ("float8_e4m3fn", "int8", "bfloat16")
"""What DTYPE= may say, the first by default."""

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
"""M: a decode step has as many rows as there are running requests, a prefill step up to vLLM's
batch limit."""

PATTERNS = ("2:4", "mixed", "4:6", "6:8", "8:10")

TOLERANCE = 1e-2
"""‖out - exact‖ / ‖exact‖. Rounding to bfloat16 once gives 1.7e-3, twice (cuSPARSELt) 2.4e-3;
tensor cores of Hopper keep few bits of a sum of float8 products, in vLLM's dense kernels too."""

CAPTURED = ("gemm", "quantized_gemm")
"""The layers of a capture that this operation computes."""


def cases(models: Sequence[str], tokens: Sequence[int], dtype: str) -> Iterator[Case]:
    """Every layer of ``models`` in every pattern at every M of ``tokens``."""
    for name in models:
        for layer, (n, k, has_bias) in MODELS[name].layers().items():
            if layer not in LAYERS:
                continue
            for pattern in PATTERNS:
                if pattern == "mixed" and dtype == "bfloat16":
                    continue
                for m in tokens:
                    yield case({"model": name, "layer": layer}, m, n, k, pattern, has_bias, dtype)


def captured(
    labels: dict[str, str | int], m: int, shape: Mapping[str, int], dtype: str
) -> Iterator[Case]:
    """A layer in every pattern, of what `make capture` writes."""
    for pattern in PATTERNS if labels["layer"] != "lm_head" else ():
        if pattern != "mixed" or dtype != "bfloat16":
            yield case(labels, m, shape["N"], shape["K"], pattern, bool(shape["bias"]), dtype)


def checks(dtype: str) -> Iterator[Case]:
    """Small shapes with every kind of edge: one row, sizes that no tile divides, groups that are
    not full, rows of y that no wide store fits."""
    for m, n, k, pattern in [
        (1, 128, 256, "2:4"),
        (2, 24, 1, "6:8"),
        (33, 65, 129, "4:6"),
        (17, 100, 200, "6:8"),
        (130, 200, 96, "8:10"),
        (3, 40, 130, "30:32"),
        *([] if dtype == "bfloat16" else [(33, 200, 129, "mixed"), (130, 264, 300, "mixed")]),
    ]:
        for has_bias in (False, True):
            labels: dict[str, str | int] = {"check": "bias" if has_bias else "no bias"}
            yield case(labels, m, n, k, pattern, has_bias, dtype)


def baselines(dtype: str) -> list[Contender]:
    """Dense layers of the same dtype: vLLM's, if its compiled kernels are installed, then torch's.

    Ratios are to the first. For bfloat16 vLLM calls torch.
    """
    torch_linear = Contender("torch, dense", _torch)
    if dtype == "bfloat16":
        return [torch_linear]
    vllm = Contender(
        "vllm, dense", _vllm, unavailable_reason=vllm_kernel_missing("cutlass_scaled_mm")
    )
    installed = torch.cuda.is_available() and vllm.unavailable_reason(torch.device("cuda")) is None
    return [vllm, torch_linear] if installed else [torch_linear, vllm]


def contender(backend: registry.Backend, device: torch.device, dtype: str) -> Contender:
    """The whole layer with a custom backend: the weight is packed outside of the timing."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    backend.runner(device, torch_dtype)

    def prepare(inputs: Sequence[Any]) -> Sequence[Any]:
        x, weight, scale, bias, pattern = inputs
        packed = pack(weight, pattern, scale, backend=backend.name)
        shape = (packed.pattern, packed.features, packed.k, packed.dtype)
        return x, bias, shape, packed.values, packed.metadata, packed.scale

    def run(
        x: torch.Tensor, bias: torch.Tensor | None, shape: Any, *tensors: torch.Tensor
    ) -> torch.Tensor:
        return sparse_linear(x, SparseWeight(backend.name, *shape, *tensors), bias)

    mixed = hasattr(backend.module, "mixed_storage")
    return Contender(
        backend.name, run, prepare, takes=lambda case: mixed or case.labels["pattern"] != "mixed"
    )


def case(
    labels: dict[str, str | int],
    m: int,
    n: int,
    k: int,
    pattern: str,
    has_bias: bool,
    dtype: str,
) -> Case:
    """x of variance 1 and weights of variance about 1/K before two in each group become zero
    (of a mixed weight in half of the rows).

    The inputs are x [M, K], the weight [N, K], its scale [N] or None, the bias [N] or None, and the
    pattern.
    """
    torch_dtype: torch.dtype = getattr(torch, dtype)
    quantized = torch_dtype != torch.bfloat16
    kind = sparsity.pattern(pattern)
    deviation = 40.0  # of a quantized weight: the largest of a row is 3 to 4 times as large

    def empty_inputs(device: torch.device) -> tuple[Any, ...]:
        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        scale = empty((n,), torch.float32) if quantized else None
        bias = empty((n,), torch.bfloat16) if has_bias else None
        return empty((m, k), torch.bfloat16), empty((n, k), torch_dtype), scale, bias, pattern

    def fill(inputs: Sequence[Any]) -> None:
        x, weight, scale, bias, _ = inputs
        x.normal_()
        step = max(1, (1 << 26) // max(k, 1) // 128) * 128
        for rows in weight.split(step):
            rows.copy_(_random_weight(rows.shape[0], k, kind, torch_dtype, deviation, x.device))
        if scale is not None:
            scale.uniform_(0.5, 1.5).mul_(k**-0.5 / deviation)
        if bias is not None:
            bias.normal_()

    length = kind.expanded(k)
    row = length // 2 * torch_dtype.itemsize + length // 8  # values and metadata
    if kind.mixed:
        row = (row + k) / 2
    return Case(
        labels={**labels, "pattern": pattern, "M": m, "N": n, "K": k},
        empty_inputs=empty_inputs,
        fill=fill,
        flops=2.0 * m * n * k,
        bytes=float(2 * m * k + n * row + 2 * m * n),
        tolerance=TOLERANCE,
        peak=dtype,
    )


def _random_weight(
    rows: int,
    k: int,
    pattern: sparsity.Pattern,
    dtype: torch.dtype,
    deviation: float,
    device: torch.device,
) -> torch.Tensor:
    shape = (rows, pattern.groups(k), pattern.group)
    values = torch.randn(shape, device=device)
    values *= deviation if dtype != torch.bfloat16 else k**-0.5
    first = torch.randint(pattern.group, (*shape[:2], 1), device=device)
    step = torch.randint(1, pattern.group, (*shape[:2], 1), device=device)
    zeros = values.scatter(2, torch.cat([first, (first + step) % pattern.group], 2), 0.0)
    if pattern.mixed:  # four of every eight groups of rows, at random
        groups = torch.rand((-(-rows // 64), 8), device=device).argsort(1) < 4
        zeros = zeros.where(groups.repeat_interleave(8)[:rows, None, None], values)
    values = zeros.flatten(1)[:, :k]
    if dtype == torch.int8:
        values = values.round().clamp(-127, 127)
    return values.to(dtype)


def _torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    pattern: str,
) -> torch.Tensor:
    if scale is None:
        return linear(x, weight, bias)
    if x.device.type != "cuda":
        return reference.exact(x, weight, scale, bias, pattern).bfloat16()
    q, q_scale = quantization.quantize(x, weight.dtype)
    if weight.dtype == torch.float8_e4m3fn:
        return torch._scaled_mm(
            q, weight.t(), q_scale[:, None], scale[None], bias, out_dtype=torch.bfloat16
        )
    rows = len(q)
    if rows <= 16:  # torch._int_mm takes no fewer
        q = pad(q, (0, 0, 0, 32 - rows))
    out = torch._int_mm(q, weight.t())[:rows] * q_scale[:, None] * scale
    return (out if bias is None else out + bias).bfloat16()


def _vllm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    pattern: str,
) -> torch.Tensor:
    ops = importlib.import_module("vllm._custom_ops")
    q, q_scale = vllm_quantize(x, weight.dtype)
    multiply: Callable[..., torch.Tensor] = ops.cutlass_scaled_mm
    return multiply(q, weight.t(), q_scale, scale[:, None], torch.bfloat16, bias)
