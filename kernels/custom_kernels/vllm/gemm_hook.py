# SPDX-License-Identifier: Apache-2.0
"""What vLLM calls for its unquantized linear layers when ``VLLM_USE_CUSTOM_GEMM=1``: the fork by
its patches, a released vLLM by what ``upstream_hook`` puts in.

All of them run our GEMM, or, with ``VLLM_CUSTOM_GEMM_LAYERS="*.mlp.*,lm_head"``, those whose names
match a pattern (as in a shell; several with commas).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

import custom_kernels.gemm  # registers torch.ops.custom_kernels.gemm  # noqa: F401
from custom_kernels import launches
from custom_kernels.vllm import choice, upstream


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
        layers().load(name)
    assert isinstance(layer.weight, torch.Tensor)
    launches.layer(name, layer.weight.data_ptr(), expected=linear)
    entered = "apply" in vars(method)  # weights may be loaded again
    if not takes_all() and not upstream.needs_own_gemm() and not entered:
        method.apply = functools.partial(_apply, method.apply)
    return upstream.packs_weights() and name in layers()


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
    layers().warn_of_patterns_without_a_layer()
    return name in layers()


@functools.cache
def layers() -> choice.Layers:
    """The layers that run our GEMM."""
    return choice.Layers("VLLM_CUSTOM_GEMM_LAYERS", upstream.wanted_layers())


@torch.compiler.assume_constant_result
def _backend(device_type: str, dtype: torch.dtype) -> str:
    # Under torch.compile this runs once, while tracing, and its result becomes a constant of the
    # graph.
    return choose_backend(device_type, dtype)


@functools.cache
def choose_backend(device_type: str, dtype: torch.dtype) -> str:
    """``VLLM_CUSTOM_GEMM_BACKEND``, see ``choice.backend``."""
    return choice.backend("gemm", upstream.wanted_backend(), device_type, dtype)
