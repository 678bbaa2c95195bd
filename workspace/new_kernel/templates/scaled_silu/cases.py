# SPDX-License-Identifier: Apache-2.0
"""Where scaled_silu is measured, and where it is checked."""

from collections.abc import Iterator, Sequence

import torch

from custom_kernels.check.case import Case, Contender
from custom_kernels.scaled_silu import reference

MODELS = {"qwen2.5-0.5b": 4864, "qwen2.5-7b": 18944}
"""K: the width of the feed-forward layer."""
DEFAULT_MODELS = ("qwen2.5-7b",)
TOKENS = (1, 16, 256, 4096)
DTYPES = ("bfloat16", "float16")

TOLERANCES = {"bfloat16": 8e-3, "float16": 1e-3}
"""‖out - exact‖ / ‖exact‖: rounding the output once gives about 1.7e-3 or 2.1e-4; Triton's
interpreter cuts off instead, which is twice that."""


def cases(models: Sequence[str], tokens: Sequence[int], dtype: str) -> Iterator[Case]:
    """Every model at every M."""
    for name in models:
        for m in tokens:
            yield case({"model": name, "layer": "mlp"}, m, MODELS[name], dtype)


def checks(dtype: str) -> Iterator[Case]:
    """Small shapes with every kind of edge."""
    for m, k in [(0, 64), (1, 1), (1, 256), (3, 1000), (33, 1025)]:
        yield case({"check": "edges"}, m, k, dtype)


def baselines(dtype: str) -> list[Contender]:
    """What a user would call instead."""
    return [Contender("torch", reference.run)]


def case(labels: dict[str, str | int], m: int, k: int, dtype: str) -> Case:
    """x and scale of variance 1."""
    torch_dtype: torch.dtype = getattr(torch, dtype)

    def empty_inputs(device: torch.device) -> tuple[torch.Tensor, ...]:
        return (
            torch.empty((m, k), dtype=torch_dtype, device=device),
            torch.empty(k, dtype=torch_dtype, device=device),
        )

    def fill(inputs: Sequence[torch.Tensor]) -> None:
        for tensor in inputs:
            tensor.normal_()

    return Case(
        labels={**labels, "M": m, "K": k},
        empty_inputs=empty_inputs,
        fill=fill,
        flops=5.0 * m * k,
        bytes=float(torch_dtype.itemsize * (2 * m * k + k)),
        tolerance=TOLERANCES[dtype],
        peak=dtype,
    )
