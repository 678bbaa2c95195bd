# SPDX-License-Identifier: Apache-2.0
"""The linear layers of real models: where GEMM is measured.

Query, key and value are one layer, gate and up another, as vLLM runs them.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from custom_kernels.check.case import Case, Contender
from custom_kernels.check.models import DEFAULT_MODELS, MODELS
from custom_kernels.gemm import reference

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
    "layer_of",
]

DTYPES = ("bfloat16", "float16")
"""What DTYPE= may say, the first by default."""

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""M: a decode step has as many rows as there are running requests, a prefill step up to vLLM's
batch limit."""

TOLERANCES = {"bfloat16": 3e-3, "float16": 4e-4}
"""‖out - exact‖ / ‖exact‖: rounding the output once to 8 or 11 bits gives about 1.7e-3 or
2.1e-4."""


CAPTURED = ("gemm",)
"""The layers of a capture that this operation computes."""


def cases(models: Sequence[str], tokens: Sequence[int], dtype: str) -> Iterator[Case]:
    """Every layer of ``models`` at every M of ``tokens``."""
    for name in models:
        for layer, (n, k, has_bias) in MODELS[name].layers().items():
            for m in tokens:
                labels: dict[str, str | int] = {"model": name, "layer": layer}
                yield case(labels, m, n, k, has_bias, dtype)


def captured(
    labels: dict[str, str | int], m: int, shape: Mapping[str, int], dtype: str
) -> Iterator[Case]:
    """A layer with M rows, of what `make capture` writes."""
    yield case(labels, m, shape["N"], shape["K"], bool(shape["bias"]), dtype)


def layer_of(labels: Mapping[str, str | int]) -> dict[str, int | bool] | None:
    """What tuning tells layers apart by; None for a case that is no layer of a model."""
    model = MODELS.get(str(labels.get("model")))
    if model is None:
        return None
    n, k, has_bias = model.layers()[str(labels["layer"])]
    return {"N": n, "K": k, "bias": has_bias}


def checks(dtype: str) -> Iterator[Case]:
    """Small shapes with every kind of edge: no row, one row, sizes that no tile divides."""
    for m, n, k in [(0, 16, 32), (1, 24, 1), (1, 128, 256), (33, 65, 129), (64, 96, 128)]:
        for has_bias in (False, True):
            yield case({"check": "bias" if has_bias else "no bias"}, m, n, k, has_bias, dtype)


def baselines(dtype: str) -> list[Contender]:
    """What a user would call instead: torch's linear layer."""
    return [Contender("torch", reference.run)]


def case(labels: dict[str, str | int], m: int, n: int, k: int, has_bias: bool, dtype: str) -> Case:
    """x of variance 1 and weights of variance 1/K, so that outputs have variance about 1 at every
    shape."""
    torch_dtype: torch.dtype = getattr(torch, dtype)

    def empty_inputs(device: torch.device) -> tuple[torch.Tensor | None, ...]:
        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch_dtype, device=device)

        return empty(m, k), empty(n, k), empty(n) if has_bias else None

    def fill(inputs: Sequence[torch.Tensor | None]) -> None:
        for tensor, deviation in zip(inputs, (1.0, k**-0.5, 1.0), strict=True):
            if tensor is not None:
                tensor.normal_(0, deviation)

    item = torch_dtype.itemsize
    return Case(
        labels={**labels, "M": m, "N": n, "K": k},
        empty_inputs=empty_inputs,
        fill=fill,
        flops=2.0 * m * n * k,
        bytes=float(item * (m * k + n * k + m * n + (n if has_bias else 0))),
        tolerance=TOLERANCES[dtype],
        peak=dtype,
    )
