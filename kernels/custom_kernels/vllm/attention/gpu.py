# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention on GPUs, FlashAttention and its own in Triton, with our decode."""

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

from custom_kernels.vllm.attention._decode import Decode


class _Flash(Decode, FlashAttentionImpl):
    """Our decode, FlashAttention's prefill."""


class FlashAttention(FlashAttentionBackend):
    """The cache, the metadata and the name are FlashAttention's."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """What a layer makes one of."""
        return _Flash


class _Triton(Decode, TritonAttentionImpl):
    """Our decode, vLLM's prefill."""


class TritonAttention(TritonAttentionBackend):
    """The cache, the metadata and the name are those of vLLM's backend in Triton."""

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        """What a layer makes one of."""
        return _Triton
