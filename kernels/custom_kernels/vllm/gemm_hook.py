# SPDX-License-Identifier: Apache-2.0
"""What the fork of vLLM calls for its unquantized linear layers when ``VLLM_USE_CUSTOM_GEMM=1``.

All of them run our GEMM, or, with ``VLLM_CUSTOM_GEMM_LAYERS="*.mlp.*,lm_head"``, those whose names
match a pattern (as in a shell; several with commas). Which one runs what is decided once per layer,
while torch.compile traces or at the first call. No name gets into the graph: layers of equal shape
stay equal to the compiler.
"""

import functools
import logging
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch

import custom_kernels.gemm  # registers torch.ops.custom_kernels.gemm  # noqa: F401
from custom_kernels import launches, registry
from custom_kernels.vllm import upstream

log = logging.getLogger(__name__)

SHOWN = 6
"""So many of a model's layers are named where a pattern matches none."""

_loaded: set[str] = set()


def custom_unquantized_gemm(
    layer: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x · weightᵀ + bias as one torch op. ``layer`` is part of vLLM's signature and not
    used."""
    return torch.ops.custom_kernels.gemm.default(x, weight, bias, _backend(x.device.type, x.dtype))


def takes_all() -> bool:
    """Whether every layer runs our GEMM, without patterns that choose."""
    return not upstream.wanted_layers()


def enter(method: Any, layer: torch.nn.Module) -> bool:
    """vLLM calls this for every layer of the model once its weights are loaded, before it prepares
    them for its own GEMM.

    Args:
        method: the layer's linear method, which runs our GEMM from now on if a pattern names the
            layer.

    Returns:
        Whether vLLM is to leave the weights as they are, because our GEMM reads them.
    """
    name, linear = upstream.layer_name(layer), upstream.is_linear(layer)
    if linear:
        _loaded.add(name)
    assert isinstance(layer.weight, torch.Tensor)
    launches.layer(name, layer.weight.data_ptr(), expected=linear)
    entered = "apply" in vars(method)  # weights may be loaded again
    if not takes_all() and not upstream.needs_own_gemm() and not entered:
        method.apply = functools.partial(_apply, method.apply)
    return upstream.packs_weights() and (takes_all() or _matches(name))


def _apply(
    upstream_apply: Callable[..., torch.Tensor],
    layer: torch.nn.Module,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    if _selected(upstream.layer_name(layer)):
        assert isinstance(layer.weight, torch.Tensor)
        return custom_unquantized_gemm(layer, x, layer.weight, bias)
    return upstream_apply(layer, x, bias)


@torch.compiler.assume_constant_result
def _selected(name: str) -> bool:
    _warn_of_patterns_without_a_layer()
    return _matches(name)


@functools.cache
def _matches(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _patterns())


def _patterns() -> list[str]:
    return [pattern.strip() for pattern in upstream.wanted_layers().split(",") if pattern.strip()]


@functools.cache
def _warn_of_patterns_without_a_layer() -> None:
    for pattern in _patterns():
        if not any(fnmatchcase(name, pattern) for name in _loaded):
            some = ", ".join(sorted(_loaded)[:SHOWN])
            log.warning(
                "VLLM_CUSTOM_GEMM_LAYERS: %r matches none of the %d layers here, such as %s",
                pattern,
                len(_loaded),
                some,
            )


@torch.compiler.assume_constant_result
def _backend(device_type: str, dtype: torch.dtype) -> str:
    # Under torch.compile this runs once, while tracing, and its result becomes a constant of the
    # graph.
    return choose_backend(device_type, dtype)


@functools.cache
def choose_backend(device_type: str, dtype: torch.dtype) -> str:
    """``VLLM_CUSTOM_GEMM_BACKEND``; when it is unset, none: then each call takes the best for its
    layer and number of rows.

    A layer whose dtype the wanted backend does not support (a float32 router in a bfloat16 model)
    goes to the best one that does, and that is announced. Raises registry.BackendError for a name
    that is wrong or cannot run here.
    """
    device = torch.device(device_type)
    if device.type != "cpu":
        device = torch.device(device_type, torch.accelerator.current_device_index())
    wanted, operation = upstream.wanted_backend(), registry.operation("gemm")
    backend = operation.backend(wanted) if wanted else operation.best(device)
    backend.require_available(device)
    if backend.supports_dtype(dtype):
        return wanted or ""
    able = operation.best(device, dtype).name
    log.warning(
        "gemm: %s does not support %s, layers of that dtype run with %s", backend.name, dtype, able
    )
    return able
