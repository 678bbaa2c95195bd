# SPDX-License-Identifier: Apache-2.0
"""The inputs of real models' linear layers, at which quant_expand is measured.

x is bfloat16 with a few outlier channels, like activations; DTYPE= is that of q. Layers of a model
with the same K are one case.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from custom_kernels.check.baselines import compiling, vllm_kernel_missing
from custom_kernels.check.case import Case, Contender
from custom_kernels.check.inputs import make_edges, make_outliers
from custom_kernels.check.models import DEFAULT_MODELS, MODELS
from custom_kernels.check.quantized import (
    PLAIN,
    Rounded,
    contender,
    too_far,
    vllm_quantize,
    wrong_bytes,
)
from custom_kernels.quant_expand import expanded, reference
from custom_kernels.quantization import quantize

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
    "contender",
]

DTYPES = ("int8", "float8_e4m3fn")
"""What DTYPE= may say, the first by default."""

TOKENS = (1, 16, 128, 1024, 4096, 16384)
"""M: a decode step has as many rows as there are running requests, a prefill step up to vLLM's
batch limit."""

PATTERNS = (None, "2:4", "4:6", "6:8", "8:10")
LAYERS = ("qkv", "o", "gate_up", "down")
"""The output head is not quantized."""


CAPTURED = ("gemm", "quantized_gemm")
"""The layers of a capture that this operation computes."""


def cases(models: Sequence[str], tokens: Sequence[int], dtype: str) -> Iterator[Case]:
    """Every K of ``models`` in every pattern at every M of ``tokens``."""
    for name in models:
        layers: dict[int, list[str]] = {}
        for layer, (_, k, _) in MODELS[name].layers().items():
            if layer in LAYERS:
                layers.setdefault(k, []).append(layer)
        for k, names in layers.items():
            for pattern in PATTERNS:
                for m in tokens:
                    yield case({"model": name, "layer": "+".join(names)}, m, k, pattern, dtype)


def captured(
    labels: dict[str, str | int], m: int, shape: Mapping[str, int], dtype: str
) -> Iterator[Case]:
    """The input of a layer in every pattern, of what `make capture` writes."""
    for pattern in PATTERNS if labels["layer"] != "lm_head" else ():
        yield case(labels, m, shape["K"], pattern, dtype)


def checks(dtype: str) -> Iterator[Case]:
    """Small shapes with every kind of edge: no row, one row and one value, groups that are not
    full, both parities of N, rows of zeros, of subnormals, with infinities and NaN."""
    for m, k, pattern in [
        (0, 16, "6:8"),
        (1, 1, "6:8"),
        (5, 64, None),
        (3, 100, "2:4"),
        (3, 97, "4:6"),
        (9, 200, "6:8"),
        (3, 96, "8:10"),
        (2, 130, "10:12"),
        (2, 70, "30:32"),
    ]:
        yield case({"check": "edges"}, m, k, pattern, dtype, edges=True)


def baselines(dtype: str) -> list[Contender]:
    """What a user would call instead: torch, plain and compiled; vLLM's own quantization, which
    does not expand."""
    kernels = {"int8": "dynamic_scaled_int8_quant"}
    kernel = kernels.get(dtype, "dynamic_per_token_scaled_fp8_quant")

    return [
        Contender("torch", reference.run),
        Contender("torch.compile", _compiled, unavailable_reason=compiling),
        Contender("vllm, not expanded", _vllm, unavailable_reason=vllm_kernel_missing(kernel)),
    ]


def case(
    labels: dict[str, str | int],
    m: int,
    k: int,
    pattern: str | None,
    dtype: str,
    edges: bool = False,
) -> Case:
    """x of variance 1 with an outlier channel in a hundred, 20 to 50 times as large."""
    torch_dtype: torch.dtype = getattr(torch, dtype)

    def empty_inputs(device: torch.device) -> tuple[Any, ...]:
        return torch.empty((m, k), dtype=torch.bfloat16, device=device), pattern, torch_dtype

    def fill(inputs: Sequence[Any]) -> None:
        x = inputs[0]
        x.normal_()
        make_outliers(20, 50, x)
        if edges:
            make_edges(x)

    return Case(
        labels={**labels, "pattern": pattern or PLAIN, "M": m, "K": k},
        empty_inputs=empty_inputs,
        fill=fill,
        flops=2.0 * m * k,
        bytes=float(m * (2 * k + expanded(k, pattern) + 4)),
        tolerance=0.0,
        error=error,
    )


def error(inputs: Sequence[Any], outputs: Any) -> float:
    """The share of bytes that differ from the definition's; of a Rounded result, the share of
    values that are more than a step off, and of scales that are in more than their last digits."""
    x, pattern, dtype = inputs
    if isinstance(outputs, Rounded):
        if outputs.q.shape[-1] == x.shape[1]:
            right, right_scale = quantize(x, dtype)
        else:
            right, right_scale = reference.run(x, pattern, dtype)
        return too_far(outputs, right, right_scale, 1, 1e-5)
    return wrong_bytes(outputs, reference.run(x, pattern, dtype))


def _compiled(x: torch.Tensor, pattern: str | None, dtype: torch.dtype) -> Rounded:
    return Rounded(*_compile(pattern, dtype)(x))


@functools.cache
def _compile(pattern: str | None, dtype: torch.dtype) -> Callable[[torch.Tensor], Any]:
    # All share one function, of which dynamo compiles 8 versions by default.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(lambda x: reference.run(x, pattern, dtype), dynamic=True)


def _vllm(x: torch.Tensor, pattern: str | None, dtype: torch.dtype) -> Rounded:
    return vllm_quantize(x, dtype)
