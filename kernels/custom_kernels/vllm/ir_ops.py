# SPDX-License-Identifier: Apache-2.0
"""Our operations as implementations of the ops of vLLM's IR, on releases that have it.

vLLM chooses among implementations by its own setting: ``--ir-op-priority.rms_norm=custom_kernels``
takes the best backend, ``custom_kernels_triton`` that one. The layers, and what vLLM fuses with
such an op, stay vLLM's. Without the setting nothing of ours runs.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from custom_kernels import registry

PROVIDER = "custom_kernels"
OPS = {"rms_norm": ("rms_norm", "fused_add_rms_norm")}
"""Operation → vLLM's IR ops that it implements."""


def providers(operation: str) -> Iterator[tuple[str, str]]:
    """(name in vLLM's setting, backend or "" for the best) of an operation."""
    yield PROVIDER, ""
    for backend in registry.operation(operation).backend_names():
        yield f"{PROVIDER}_{backend}", backend


def register() -> None:
    """Add the implementations, if this vLLM has an IR; a second call changes nothing."""
    try:
        ops: Any = importlib.import_module("vllm.ir").ops
    except ImportError:
        return
    here = map(str, registry.operations())  # a wheel may hold some of them only
    if "rms_norm" in here and PROVIDER not in ops.rms_norm.impls:
        for provider, backend in providers("rms_norm"):
            _register_rms_norm(ops, provider, backend)


def _register_rms_norm(ops: Any, provider: str, backend: str) -> None:
    run = importlib.import_module("custom_kernels.rms_norm").custom_rms_norm

    def norm(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> torch.Tensor:
        y, _ = run(x, None, weight, epsilon, backend=backend or None)
        return y

    def add_and_norm(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, total = run(x, x_residual, weight, epsilon, backend=backend or None)
        return y, total

    def supports(x: torch.Tensor, weight: torch.Tensor | None, variance_size: int | None) -> bool:
        one = registry.operation("rms_norm")
        named = not backend or one.backend(backend).supports_dtype(x.dtype)
        return variance_size is None and (weight is None or weight.dtype == x.dtype) and named

    def supports_norm(
        x: Any, weight: Any, epsilon: float, variance_size: int | None = None
    ) -> bool:
        return supports(x, weight, variance_size)

    def supports_add(
        x: Any, x_residual: Any, weight: Any, epsilon: float, variance_size: int | None = None
    ) -> bool:
        return supports(x, weight, variance_size)

    ops.rms_norm.register_impl(provider, supports_args=supports_norm)(norm)
    ops.fused_add_rms_norm.register_impl(provider, supports_args=supports_add)(add_and_norm)
