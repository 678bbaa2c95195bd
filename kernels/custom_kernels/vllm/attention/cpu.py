# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention on CPUs with our decode.

Its kernels pack keys for the instructions of the machine. A layer of ours keeps its part of the
cache, which no other layer reads, as GPUs do, a token's key and value side by side; so what is not
decoded by our operation is computed by torch there, one sequence after the other.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from custom_kernels.vllm import upstream_attention
from custom_kernels.vllm.attention._decode import Decode
from custom_kernels.vllm.layers import _base


class _CPU(Decode, CPUAttentionBackendImpl):
    """Our decode and torch's prefill, or vLLM's own for both."""

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Keep key and value [tokens, Hkv, D] in the slots of the cache, or nowhere at -1."""
        if not self.is_custom:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        kept = (slot_mapping >= 0).nonzero().squeeze(1)
        slots = slot_mapping[kept]
        for new, pages in zip(
            (key, value), upstream_attention.pages(kv_cache, self.head_size), strict=True
        ):
            pages[slots // pages.shape[1], slots % pages.shape[1]] = new[kept]

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
        """Ours also where not every sequence has one token, once there is a cache."""
        _base.all_are_loaded()
        decodes = attn_metadata is None or upstream_attention.is_decode(attn_metadata)
        if decodes or not self.is_custom:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *quantized, **scales
            )
        keys, values = upstream_attention.pages(kv_cache, self.head_size)
        starts, lengths = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        for one, length in enumerate(lengths):
            rows = slice(starts[one], starts[one + 1])
            tokens = rows.stop - rows.start
            table = attn_metadata.block_table[one, : -(-length // keys.shape[1])]
            seen = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)
            y = scaled_dot_product_attention(
                query[rows].transpose(0, 1),
                keys[table].flatten(0, 1)[:length].transpose(0, 1),
                values[table].flatten(0, 1)[:length].transpose(0, 1),
                seen,
                scale=self.scale,
                enable_gqa=True,
            )
            output[rows] = y.transpose(0, 1)
        return output


class CPUAttention(CPUAttentionBackend):
    """The metadata, the name and the size of the cache are those of vLLM's backend for CPUs."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """What a layer makes one of."""
        return _CPU
