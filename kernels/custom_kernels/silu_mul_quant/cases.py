# SPDX-License-Identifier: Apache-2.0
"""The activations of real models, at which silu_mul_quant is measured.

x is bfloat16 of variance 4 with a few outlier channels, like what gate and up projections return;
DTYPE= is that of q.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from custom_kernels import custom_quant_expand
from custom_kernels.check.baselines import compiled, compiling, vllm_kernel_missing
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
from custom_kernels.quant_expand import expanded
from custom_kernels.silu_mul_quant import reference

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

DTYPES = ("float8_e4m3fn", "int8")
"""What DTYPE= may say, the first by default."""

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
"""M: a decode step has as many rows as there are running requests, a prefill step up to vLLM's
batch limit."""

PATTERNS = ("2:4", "4:6", "6:8")

CAPTURED = ("silu_and_mul",)
"""The layers of a capture that this operation computes."""


def cases(models: Sequence[str], tokens: Sequence[int], dtype: str) -> Iterator[Case]:
    """The activation of every one of ``models`` for every pattern at every M of ``tokens``."""
    for name in models:
        for pattern in PATTERNS:
            for m in tokens:
                labels: dict[str, str | int] = {"model": name, "layer": "activation"}
                yield case(labels, m, MODELS[name].intermediate, pattern, dtype)


def captured(
    labels: dict[str, str | int], m: int, shape: Mapping[str, int], dtype: str
) -> Iterator[Case]:
    """An activation of M rows for every pattern, of what `make capture` writes."""
    for pattern in PATTERNS:
        yield case(labels, m, shape["K"], pattern, dtype)


def checks(dtype: str) -> Iterator[Case]:
    """Small shapes with every kind of edge: no row, one row and one value, vectors and groups that
    are not full, rows of zeros, of subnormals, with infinities and NaN."""
    for m, k, pattern in [
        (0, 16, "6:8"),
        (1, 1, "6:8"),
        (5, 64, None),
        (3, 100, "2:4"),
        (3, 97, "4:6"),
        (9, 200, "6:8"),
        (3, 96, "8:10"),
        (2, 130, "10:12"),
        (2, 4872, "6:8"),
    ]:
        yield case({"check": "edges"}, m, k, pattern, dtype, edges=True)


def baselines(dtype: str) -> list[Contender]:
    """What a user would call instead: the activation compiled by torch, then quant_expand, as vLLM
    does without a fusion; torch alone; vLLM's own two kernels, which do not expand."""

    return [
        Contender("unfused", _unfused, unavailable_reason=compiling),
        Contender("torch", reference.run),
        Contender(
            "vllm, not expanded", _vllm, unavailable_reason=vllm_kernel_missing("silu_and_mul")
        ),
    ]


def case(
    labels: dict[str, str | int],
    m: int,
    k: int,
    pattern: str | None,
    dtype: str,
    edges: bool = False,
) -> Case:
    """x of variance 4 with an outlier channel in a hundred, 5 to 10 times as large."""
    torch_dtype: torch.dtype = getattr(torch, dtype)

    def empty_inputs(device: torch.device) -> tuple[Any, ...]:
        return torch.empty((m, 2 * k), dtype=torch.bfloat16, device=device), pattern, torch_dtype

    def fill(inputs: Sequence[Any]) -> None:
        x = inputs[0]
        x.normal_(0, 2)
        make_outliers(5, 10, x)
        if edges:
            make_edges(x[:, :k])

    return Case(
        labels={**labels, "pattern": pattern or PLAIN, "M": m, "K": k},
        empty_inputs=empty_inputs,
        fill=fill,
        flops=8.0 * m * k,
        bytes=float(m * (4 * k + expanded(k, pattern) + 4)),
        tolerance=0.0,
        error=error,
    )


def error(inputs: Sequence[Any], outputs: Any) -> float:
    """The share of bytes that differ from the definition's; of a Rounded result, the share of
    values that are too far off, as in rms_norm_quant."""
    x, pattern, dtype = inputs
    if not isinstance(outputs, Rounded):
        return wrong_bytes(outputs, reference.run(*inputs))
    full = outputs.q.shape[-1] != x.shape[1] // 2
    right, right_scale = reference.run(x, pattern if full else None, dtype)
    return too_far(outputs, right[:, : outputs.q.shape[-1]], right_scale, 3, 2**-6)


_compiled = compiled(reference.activate)


def _unfused(x: torch.Tensor, pattern: str | None, dtype: torch.dtype) -> Rounded:
    return Rounded(*custom_quant_expand(_compiled(x), pattern, dtype))


def _vllm(x: torch.Tensor, pattern: str | None, dtype: torch.dtype) -> Rounded:
    importlib.import_module("vllm._custom_ops")
    y = x.new_empty(x.shape[0], x.shape[1] // 2)
    torch.ops._C.silu_and_mul(y, x)
    return vllm_quantize(y, dtype)
