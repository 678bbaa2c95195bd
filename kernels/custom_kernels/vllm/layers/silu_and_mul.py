# SPDX-License-Identifier: Apache-2.0
"""vLLM's SwiGLU activation by ``custom_kernels.silu_and_mul``."""

import torch
from vllm.model_executor.layers.activation import SiluAndMul

import custom_kernels.silu_and_mul  # registers torch.ops.custom_kernels.silu_and_mul  # noqa: F401
from custom_kernels.vllm.layers._base import Layer


class CustomSiluAndMul(Layer, SiluAndMul):
    """y = silu(first half of x) · second half."""

    def custom(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., 2K] → [..., K]."""
        return torch.ops.custom_kernels.silu_and_mul.default(x, self.called, self.backend_for(x))
