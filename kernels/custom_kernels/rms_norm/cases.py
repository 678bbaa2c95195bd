# SPDX-License-Identifier: Apache-2.0
"""The norms of real models, at which rms_norm is measured.

x and residual are of variance 1 with a few outlier channels, like activations. Every norm of a
model has the same K and, but the first, a residual.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from custom_kernels.check.baselines import compiled, compiling, vllm_kernel_missing
from custom_kernels.check.case import Case, Contender
from custom_kernels.check.inputs import make_outliers
from custom_kernels.check.models import DEFAULT_MODELS, MODELS
from custom_kernels.rms_norm import reference

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

EPSILON = 1e-6

CAPTURED = ("rms_norm",)
"""The layers of a capture that this operation computes."""


def cases(models: Sequence[str], tokens: Sequence[int], dtype: str) -> Iterator[Case]:
    """The norm of every one of ``models`` at every M of ``tokens``."""
    for name in models:
        for m in tokens:
            labels: dict[str, str | int] = {"model": name, "layer": "norm"}
            yield case(labels, m, MODELS[name].hidden, dtype)


def captured(
    labels: dict[str, str | int], m: int, shape: Mapping[str, int], dtype: str
) -> Iterator[Case]:
    """A norm of M rows, of what `make capture` writes."""
    yield case(labels, m, shape["K"], dtype, residual=bool(shape["residual"]))


def checks(dtype: str) -> Iterator[Case]:
    """Small shapes with every kind of edge: no row, one row, one value, odd widths, vectors that
    are not full, a row that is longer than what a block keeps; without residual, without weight."""
    for m, k in [(0, 16), (1, 1), (1, 128), (3, 97), (5, 200), (2, 1160), (2, 20000)]:
        yield case({"check": "residual"}, m, k, dtype)
    for m, k in [(1, 128), (3, 97)]:
        yield case({"check": "no residual"}, m, k, dtype, residual=False)
    yield case({"check": "no weight"}, 3, 136, dtype, weight=None)
    yield case({"check": "weight in float32"}, 3, 136, dtype, weight=torch.float32)
    yield case({"check": "strided rows"}, 4, 136, dtype, stride=160)
    yield case({"check": "unaligned rows"}, 4, 136, dtype, stride=139)


def baselines(dtype: str) -> list[Contender]:
    """What a user would call instead: the norm compiled by torch, as vLLM does without custom ops;
    torch alone; vLLM's own kernel."""

    return [
        Contender("torch.compile", compiled(reference.run), unavailable_reason=compiling),
        Contender("torch", reference.run),
        Contender("vllm", _vllm, unavailable_reason=vllm_kernel_missing("fused_add_rms_norm")),
    ]


def case(
    labels: dict[str, str | int],
    m: int,
    k: int,
    dtype: str,
    residual: bool = True,
    weight: torch.dtype | str | None = "like x",
    stride: int = 0,
) -> Case:
    """x and residual of variance 1 with an outlier channel in a hundred, 20 to 50 times as large;
    weights around 1.

    Args:
        weight: its dtype.
        stride: of rows of x and residual; 0: K.
    """
    x_dtype: torch.dtype = getattr(torch, dtype)
    weight_dtype = x_dtype if isinstance(weight, str) else weight

    def empty_inputs(device: torch.device) -> tuple[Any, ...]:
        def rows() -> torch.Tensor:
            return torch.empty((m, stride or k), dtype=x_dtype, device=device)[:, :k]

        gains = None
        if weight_dtype is not None:
            gains = torch.empty(k, dtype=weight_dtype, device=device)
        return rows(), rows() if residual else None, gains, EPSILON

    def fill(inputs: Sequence[Any]) -> None:
        x, other, gains, _ = inputs
        if gains is not None:
            gains.normal_(1, 0.2)
        tensors = [x] if other is None else [x, other]
        for tensor in tensors:
            tensor.normal_()
        make_outliers(20, 50, *tensors)

    moved = m * k * (4 if residual else 2) * x_dtype.itemsize
    if weight_dtype is not None:
        moved += k * weight_dtype.itemsize
    return Case(
        labels={**labels, "M": m, "K": k},
        empty_inputs=empty_inputs,
        fill=fill,
        flops=(5.0 if residual else 4.0) * m * k,
        bytes=float(moved),
        tolerance=TOLERANCES[dtype],
        per_token=(0, 1),
    )


def _vllm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    # With a residual it writes over x and the residual: into copies here, so that a call can be
    # repeated, and so two copies more than it takes in the engine.
    importlib.import_module("vllm._custom_ops")
    y = x.clone(memory_format=torch.contiguous_format)
    if residual is None:
        torch.ops._C.rms_norm(y, x, weight, epsilon)
        return y, x.new_empty(0)
    total = residual.clone(memory_format=torch.contiguous_format)
    torch.ops._C.fused_add_rms_norm(y, total, weight, epsilon)
    return y, total
