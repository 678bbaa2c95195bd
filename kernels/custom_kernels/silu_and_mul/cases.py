# SPDX-License-Identifier: Apache-2.0
"""The activations of real models, at which silu_and_mul is measured.

x is of variance 4, like what gate and up projections return.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from custom_kernels.check.baselines import compiled, compiling, vllm_kernel_missing
from custom_kernels.check.case import Case, Contender
from custom_kernels.check.models import DEFAULT_MODELS, MODELS
from custom_kernels.silu_and_mul import reference

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

DTYPES = ("bfloat16", "float16", "float32")
"""What DTYPE= may say, the first by default."""

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
"""M: a decode step has as many rows as there are running requests, a prefill step up to vLLM's
batch limit."""

TOLERANCES = {"bfloat16": 8e-3, "float16": 1e-3, "float32": 1e-6}
"""‖out - exact‖ / ‖exact‖: rounding to 8 or 11 bits is off by at most 3.9e-3 or 4.9e-4, and y is
rounded twice. Of many values it is a third of that."""

CAPTURED = ("silu_and_mul",)
"""The layers of a capture that this operation computes."""


def cases(models: Sequence[str], tokens: Sequence[int], dtype: str) -> Iterator[Case]:
    """The activation of every one of ``models`` at every M of ``tokens``."""
    for name in models:
        for m in tokens:
            labels: dict[str, str | int] = {"model": name, "layer": "activation"}
            yield case(labels, m, MODELS[name].intermediate, dtype)


def captured(
    labels: dict[str, str | int], m: int, shape: Mapping[str, int], dtype: str
) -> Iterator[Case]:
    """An activation of M rows, of what `make capture` writes."""
    yield case(labels, m, shape["K"], dtype)


def checks(dtype: str) -> Iterator[Case]:
    """Small shapes with every kind of edge: no row, one row, one value, odd widths, vectors that
    are not full, a row of several blocks, many short rows."""
    for m, k in [(0, 16), (1, 1), (1, 128), (3, 97), (5, 200), (2, 4872), (700, 8)]:
        yield case({"check": "edges"}, m, k, dtype)
    yield case({"check": "strided rows"}, 4, 136, dtype, stride=288)
    yield case({"check": "unaligned rows"}, 4, 136, dtype, stride=279)


def baselines(dtype: str) -> list[Contender]:
    """What a user would call instead: the activation compiled by torch, as vLLM does without custom
    ops; torch alone; vLLM's own kernel."""

    return [
        Contender("torch.compile", compiled(reference.run), unavailable_reason=compiling),
        Contender("torch", reference.run),
        Contender("vllm", _vllm, unavailable_reason=vllm_kernel_missing("silu_and_mul")),
    ]


def case(labels: dict[str, str | int], m: int, k: int, dtype: str, stride: int = 0) -> Case:
    """x of variance 4, its rows ``stride`` values apart; 0: 2K."""
    x_dtype: torch.dtype = getattr(torch, dtype)

    def empty_inputs(device: torch.device) -> tuple[Any, ...]:
        return (torch.empty((m, stride or 2 * k), dtype=x_dtype, device=device)[:, : 2 * k],)

    def fill(inputs: Sequence[Any]) -> None:
        inputs[0].normal_(0, 2)

    return Case(
        labels={**labels, "M": m, "K": k},
        empty_inputs=empty_inputs,
        fill=fill,
        flops=5.0 * m * k,
        bytes=float(3 * m * k * x_dtype.itemsize),
        tolerance=TOLERANCES[dtype],
    )


def _vllm(x: torch.Tensor) -> torch.Tensor:
    importlib.import_module("vllm._custom_ops")
    y = x.new_empty(x.shape[0], x.shape[1] // 2)
    torch.ops._C.silu_and_mul(y, x)
    return y
