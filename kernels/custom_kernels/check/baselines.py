# SPDX-License-Identifier: Apache-2.0
"""What the baselines of several operations have in common."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` by torch.compile, for any number of rows; compiled when it is first called."""

    @functools.cache
    def made() -> Callable[..., Any]:
        return torch.compile(function, dynamic=True)

    def run(*arguments: Any) -> Any:
        return made()(*arguments)

    return run


def compiling(device: torch.device) -> str | None:
    """Why torch.compile is not measured on a device, as a Contender asks it."""
    return None if device.type == "cuda" else "torch.compile is measured on CUDA devices"


def vllm_kernel_missing(name: str) -> Callable[[torch.device], str | None]:
    """Why this one of vLLM's compiled kernels cannot run on a device, as a Contender asks it."""

    def reason(device: torch.device) -> str | None:
        if device.type != "cuda":
            return "vLLM's compiled kernels run on CUDA devices"
        try:
            importlib.import_module("vllm._custom_ops")
        except ImportError as error:
            return f"vLLM cannot be imported: {error}"
        return None if hasattr(torch.ops._C, name) else f"this vLLM has no compiled {name}"

    return reason
