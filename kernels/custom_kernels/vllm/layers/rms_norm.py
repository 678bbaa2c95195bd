# SPDX-License-Identifier: Apache-2.0
"""vLLM's RMS norm, with and without a residual, by ``custom_kernels.rms_norm``."""

import torch
from vllm.model_executor.layers.layernorm import RMSNorm

import custom_kernels.rms_norm  # registers torch.ops.custom_kernels.rms_norm  # noqa: F401
from custom_kernels.vllm.layers._base import Layer


class CustomRMSNorm(Layer, RMSNorm):
    """y = x / sqrt(mean(x²) + epsilon) · weight, where x is x + residual if that is given."""

    def unsupported(self) -> str | None:
        """A variance of some of the columns only is not ours."""
        return "its variance is not of the whole row" if self.variance_size_override else None

    def custom(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """y, and the new residual if one is given."""
        y, total = torch.ops.custom_kernels.rms_norm.default(
            x,
            residual,
            self.weight if self.has_weight else None,
            self.variance_epsilon,
            self.called,
            self.backend_for(x),
        )
        return y if residual is None else (y, total)
