# SPDX-License-Identifier: Apache-2.0
"""The norms of real models, at which rms_norm_quant is measured.

x and residual are bfloat16 of variance 1 with a few outlier channels, like activations; DTYPE= is
that of q. Every norm of a model has the same K and, but the first, a residual.
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
    wrong_bytes,
)
from custom_kernels.quant_expand import expanded
from custom_kernels.rms_norm_quant import reference

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
EPSILON = 1e-6


CAPTURED = ("rms_norm",)
"""The layers of a capture that this operation computes."""


def cases(models: Sequence[str], tokens: Sequence[int], dtype: str) -> Iterator[Case]:
    """The norm of every one of ``models`` for every pattern at every M of ``tokens``."""
    for name in models:
        for pattern in PATTERNS:
            for m in tokens:
                labels: dict[str, str | int] = {"model": name, "layer": "norm"}
                yield case(labels, m, MODELS[name].hidden, pattern, dtype)


def captured(
    labels: dict[str, str | int], m: int, shape: Mapping[str, int], dtype: str
) -> Iterator[Case]:
    """A norm of M rows for every pattern, of what `make capture` writes."""
    for pattern in PATTERNS:
        yield case(labels, m, shape["K"], pattern, dtype, residual=bool(shape["residual"]))


def checks(dtype: str) -> Iterator[Case]:
    """Small shapes with every kind of edge: no row, one row and one value, vectors and groups that
    are not full, more values than lanes, rows of zeros, of subnormals, with infinities and NaN."""
    for m, k, pattern in [
        (0, 16, "6:8"),
        (1, 1, "6:8"),
        (5, 64, None),
        (3, 100, "2:4"),
        (3, 97, "4:6"),
        (9, 200, "6:8"),
        (3, 96, "8:10"),
        (2, 130, "10:12"),
        (2, 4104, "6:8"),
        (3, 8200, "2:4"),
    ]:
        for residual in (True, False):
            labels: dict[str, str | int] = {"check": "residual" if residual else "no residual"}
            yield case(labels, m, k, pattern, dtype, residual, edges=True)


def baselines(dtype: str) -> list[Contender]:
    """What a user would call instead: the norm compiled by torch, then quant_expand, as vLLM does
    without a fusion; torch alone; vLLM's own fused kernel, which does not expand."""

    kernel = "rms_norm_dynamic_per_token_quant"
    return [
        Contender("unfused", _unfused, unavailable_reason=compiling),
        Contender("torch", reference.run),
        Contender("vllm, not expanded", _vllm, unavailable_reason=vllm_kernel_missing(kernel)),
    ]


def case(
    labels: dict[str, str | int],
    m: int,
    k: int,
    pattern: str | None,
    dtype: str,
    residual: bool = True,
    edges: bool = False,
) -> Case:
    """x and residual of variance 1 with an outlier channel in a hundred, 20 to 50 times as large;
    weights around 1."""
    torch_dtype: torch.dtype = getattr(torch, dtype)

    def empty_inputs(device: torch.device) -> tuple[Any, ...]:
        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device=device)

        other = empty(m, k) if residual else None
        return empty(m, k), other, empty(k), EPSILON, pattern, torch_dtype

    def fill(inputs: Sequence[Any]) -> None:
        x, other, weight, *_ = inputs
        weight.normal_(1, 0.2)
        tensors = [x] if other is None else [x, other]
        for tensor in tensors:
            tensor.normal_()
        make_outliers(20, 50, *tensors)
        if edges:
            make_edges(x)
            if other is not None:
                other[1:] *= 1e-38

    length = expanded(k, pattern)
    moved = m * (k * (6 if residual else 2) + length + 4) + 2 * k
    return Case(
        labels={**labels, "pattern": pattern or PLAIN, "M": m, "K": k},
        empty_inputs=empty_inputs,
        fill=fill,
        flops=6.0 * m * k,
        bytes=float(moved),
        tolerance=0.0,
        error=error,
    )


def error(inputs: Sequence[Any], outputs: Any) -> float:
    """The share of bytes that differ from the definition's; of a Rounded result, the share of
    values that are too far off: y may be two steps of bfloat16 off, a share of 2^-6, so that q may
    be three steps off."""
    x, residual, weight, epsilon, pattern, dtype = inputs
    if not isinstance(outputs, Rounded):
        return wrong_bytes(outputs, reference.run(*inputs))
    full = outputs.q.shape[-1] != x.shape[1]
    right, right_scale, _ = reference.run(
        x, residual, weight, epsilon, pattern if full else None, dtype
    )
    return too_far(outputs, right[:, : outputs.q.shape[-1]], right_scale, 3, 2**-6)


def _norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As vLLM writes it."""
    values = x.float() + residual.float()
    total = values.to(x.dtype)
    variance = values.pow(2).mean(dim=-1, keepdim=True)
    return (values * torch.rsqrt(variance + epsilon)).to(x.dtype) * weight, total


_compiled = compiled(_norm)


def _unfused(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    pattern: str | None,
    dtype: torch.dtype,
) -> Rounded:
    y, _ = _compiled(x, residual, weight, epsilon)
    return Rounded(*custom_quant_expand(y, pattern, dtype))


def _vllm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    pattern: str | None,
    dtype: torch.dtype,
) -> Rounded:
    # It writes the new residual over the old one: into a copy here, so that a call can be repeated,
    # and so a copy more than it takes in the engine.
    ops = importlib.import_module("vllm._custom_ops")
    return Rounded(
        *ops.rms_norm_dynamic_per_token_quant(x, weight, epsilon, dtype, None, residual.clone())
    )
