# SPDX-License-Identifier: Apache-2.0
"""vLLM's rotary position embedding by ``custom_kernels.rotary_embedding``.

The layers of a model share one module, so its calls are counted under the name that it has in the
first of them.
"""

from collections.abc import Callable

import torch
from vllm.model_executor.layers.rotary_embedding import Llama3RotaryEmbedding, RotaryEmbedding

import custom_kernels.rotary_embedding  # registers its torch op  # noqa: F401
from custom_kernels.vllm.layers._base import Layer


class _Rotary(Layer):
    """Rotates pairs of every head's values by angles that grow with the position."""

    # Of the replaced class.
    head_size: int
    is_neox_style: bool
    cos_sin_cache: torch.Tensor
    _match_cos_sin_cache_dtype: Callable[[torch.Tensor], torch.Tensor | None]

    def custom(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query and key [M, heads · head_size], rotated."""
        # 0.13.0 changes its cache, and returns none.
        cache = self._match_cos_sin_cache_dtype(query)
        rotated, rotated_key = torch.ops.custom_kernels.rotary_embedding.default(
            query,
            key,
            positions.flatten(),
            self.cos_sin_cache if cache is None else cache,
            self.head_size,
            self.is_neox_style,
            self.called,
            self.backend_for(query),
        )
        return rotated, None if key is None else rotated_key


class CustomRotaryEmbedding(_Rotary, RotaryEmbedding):
    """As it was published."""


class CustomLlama3RotaryEmbedding(_Rotary, Llama3RotaryEmbedding):
    """With the frequencies of Llama 3.1 and later."""
