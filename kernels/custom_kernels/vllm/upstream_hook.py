# SPDX-License-Identifier: Apache-2.0
"""The hook of the fork's patches, put into a released vLLM while our plugin is loaded: the same
switch, and the same functions of ``gemm_hook`` called at the same places."""

import functools
import os
import sys
from typing import Any

import torch
from vllm import envs
from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding

from custom_kernels import registry

SWITCH = "VLLM_USE_CUSTOM_GEMM"


def put_in() -> None:
    """Register the switch and, if it is on, put the hook in; in the fork both are there already."""
    if SWITCH in envs.environment_variables:
        return
    envs.environment_variables[SWITCH] = _is_on
    if _is_on():
        registry.operation("gemm")  # a wheel may hold others only: then this says so
        _enter_layers(linear.UnquantizedLinearMethod)
        _enter_layers(vocab_parallel_embedding.UnquantizedEmbeddingMethod)
        _replace_everywhere(
            "dispatch_unquantized_gemm", _dispatching(utils.dispatch_unquantized_gemm)
        )


def _is_on() -> bool:
    return os.getenv(SWITCH, "0") == "1"


def _enter_layers(method: Any) -> None:
    upstream_process = method.process_weights_after_loading

    @functools.wraps(upstream_process)
    def process(self: Any, layer: torch.nn.Module) -> None:
        from custom_kernels.vllm import gemm_hook

        if not gemm_hook.enter(self, layer):
            upstream_process(self, layer)

    method.process_weights_after_loading = process


def _dispatching(upstream_dispatch: Any) -> Any:
    @functools.wraps(upstream_dispatch)
    def dispatch(*arguments: Any, **more: Any) -> Any:
        from custom_kernels.vllm import gemm_hook

        if gemm_hook.takes_all():
            return gemm_hook.custom_unquantized_gemm
        return upstream_dispatch(*arguments, **more)

    return dispatch


def _replace_everywhere(name: str, function: Any) -> None:
    """In its module, for those that are imported later, and in those that have imported it."""
    replaced = getattr(utils, name)
    for module in list(sys.modules.values()):
        if (
            getattr(module, "__name__", "").startswith("vllm.")
            and vars(module).get(name) is replaced
        ):
            setattr(module, name, function)
