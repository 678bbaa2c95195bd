# SPDX-License-Identifier: Apache-2.0
"""What the fork of vLLM calls for every unquantized linear layer when
``VLLM_USE_CUSTOM_GEMM=1``."""

import functools
import logging

import torch
from vllm import envs

import custom_kernels.gemm  # registers torch.ops.custom_kernels.gemm  # noqa: F401
from custom_kernels import registry

log = logging.getLogger(__name__)


def custom_unquantized_gemm(
    layer: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x · weightᵀ + bias as one torch op. ``layer`` is part of vLLM's signature and not
    used."""
    return torch.ops.custom_kernels.gemm.default(x, weight, bias, _backend(x.device.type, x.dtype))


@torch.compiler.assume_constant_result
def _backend(device_type: str, dtype: torch.dtype) -> str:
    # Under torch.compile this runs once, while tracing, and its result becomes a constant of the
    # graph.
    return choose_backend(device_type, dtype)


@functools.cache
def choose_backend(device_type: str, dtype: torch.dtype) -> str:
    """``VLLM_CUSTOM_GEMM_BACKEND``; when it is unset, none: then each call takes the best for its
    layer and number of rows.

    A layer whose dtype the wanted backend does not take (a float32 router in a bfloat16 model) goes
    to the best one that does, and that is announced. Raises registry.BackendError for a name that
    is wrong or cannot run here.
    """
    device = torch.device(device_type)
    if device.type != "cpu":
        device = torch.device(device_type, torch.accelerator.current_device_index())
    wanted = envs.VLLM_CUSTOM_GEMM_BACKEND or registry.preferred("gemm", device)
    registry.require("gemm", wanted, device)
    if registry.takes("gemm", wanted, dtype):
        return envs.VLLM_CUSTOM_GEMM_BACKEND or ""
    backend = registry.best("gemm", device, dtype)
    log.warning(
        "gemm: %s does not take %s, layers of that dtype run with %s", wanted, dtype, backend
    )
    return backend
