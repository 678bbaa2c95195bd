# SPDX-License-Identifier: Apache-2.0
"""What our attention backends have in common: which layers decode by our operation, in which steps,
and by what their calls are counted.

vLLM calls an implementation inside of an op that the compiler does not look into, so this is plain
Python that runs in every step, or once where a CUDA graph is captured. Such a graph is replayed for
other lengths and pages: nothing here depends on their values.
"""

from typing import Any, ClassVar

import torch

import custom_kernels.paged_attention  # registers its torch op  # noqa: F401
from custom_kernels.vllm import upstream_attention
from custom_kernels.vllm.attention import OPERATION
from custom_kernels.vllm.layers import _base


class Decode(upstream_attention.Implementation):
    """The first base of an implementation; the second is vLLM's, which it extends."""

    backend: ClassVar[str | None] = None
    """Of our operation; None: the best for each call."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.is_custom = False
        # On the CPU, whatever the device: only its address is used.
        self.called = torch.zeros(1, dtype=torch.uint8, device="cpu")
        self._layers = upstream_attention.layers()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """The model is complete: the first moment at which an implementation can find its layer."""
        super().process_weights_after_loading(act_dtype)
        called = self.called.data_ptr()
        self.is_custom = _base.enter(OPERATION, self.layer_name, called, self.unsupported())

    @property
    def layer_name(self) -> str:
        """That of its layer."""
        return next(
            name for name, one in self._layers.items() if getattr(one, "impl", None) is self
        )

    def unsupported(self) -> str | None:
        """Why its layer cannot decode by our operation; None if it can."""
        return upstream_attention.unsupported(self.layer_name, self._layers)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Ours does not quantize what it returns."""
        return not self.is_custom and super().fused_output_quant_supported(quant_key)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *quantized: Any,
        **scales: Any,
    ) -> torch.Tensor:
        """query [tokens, Hq, D] → output [tokens, Hq, D], written in place."""
        _base.all_are_loaded()
        if self.is_custom and upstream_attention.is_decode(attn_metadata):
            batch = attn_metadata.num_actual_tokens
            output[:batch] = torch.ops.custom_kernels.paged_attention.default(
                query[:batch],
                *upstream_attention.pages(kv_cache, self.head_size),
                attn_metadata.block_table[:batch],
                attn_metadata.seq_lens,
                self.scale,
                self.called,
                _base.choose(OPERATION, self.backend, query.device.type, query.dtype),
            )
            return output
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, *quantized, **scales
        )
