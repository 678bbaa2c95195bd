# SPDX-License-Identifier: Apache-2.0
"""What we read of vLLM's attention: its layers, the metadata of a step and the cache's layout, with
what differs between releases. Imported when VLLM_CUSTOM_OPS names attention."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config

from custom_kernels.vllm import upstream

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionImpl as Implementation
else:
    Implementation = object
    """For the checker: at run time vLLM's implementation is another base."""


def replace_backend(name: str, path: str) -> None:
    """Let vLLM's registry give the class at ``path`` where the backend ``name`` is chosen.

    Raises RuntimeError on a release whose registry is elsewhere.
    """
    try:
        registry: Any = import_module("vllm.v1.attention.backends.registry")
    except ImportError:
        raise RuntimeError(
            "VLLM_CUSTOM_OPS: attention of this release of vLLM cannot be replaced; leave "
            "paged_attention out, or take a newer release"
        ) from None
    registry.register_backend(registry.AttentionBackendEnum[name], path)


def layers() -> Mapping[str, Any]:
    """The layers by name of the model that is being built, not all of which may be there yet: those
    with a cache, and others that vLLM's ops find by name."""
    found: Mapping[str, Any] = get_current_vllm_config().compilation_config.static_forward_context
    return found


def unsupported(name: str, layers: Mapping[str, Any]) -> str | None:
    """Why the attention layer ``name`` cannot decode by our operation; None if it can."""
    from vllm.model_executor.layers.attention import Attention

    layer, impl = layers[name], layers[name].impl
    shared = {getattr(one, "kv_sharing_target_layer_name", None) for one in layers.values()}
    reasons = {
        f"it is a {type(layer).__name__}": type(layer) is not Attention,
        f"it is an {layer.attn_type}'s": layer.attn_type != "decoder",
        "it has a sliding window": layer.sliding_window is not None,
        "it has position biases (ALiBi)": impl.alibi_slopes is not None,
        "its scores have a soft cap": bool(impl.logits_soft_cap),
        "it has sinks": getattr(impl, "sinks", None) is not None,
        "it looks back by chunks": getattr(impl, "chunk_lookback", -1) != -1,
        f"its cache holds {layer.kv_cache_dtype}": layer.kv_cache_dtype
        not in ("auto", "float16", "bfloat16"),
        "its values have another size than its keys": layer.head_size_v != layer.head_size,
        "it shares the cache of another layer": name in shared
        or layer.kv_sharing_target_layer_name is not None,
        "its cache is spread over several devices": impl.total_cp_world_size > 1,
        "its results may not depend on the batch": upstream.needs_own_gemm(),
    }
    return next((reason for reason, true in reasons.items() if true), None)


def is_decode(metadata: Any) -> bool:
    """Whether each sequence of a step has one token, or is there to fill up a CUDA graph and has
    length 0; false before there is a cache, when vLLM passes no metadata."""
    return (
        metadata is not None
        and metadata.max_query_len == 1
        and metadata.seq_lens.shape[0] == metadata.num_actual_tokens
    )


def pages(cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, each [P, page, Hkv, D], as views of a layer's cache: [P, Hkv, page, 2D], or
    in 0.25.1 on GPUs [P, 2, page, Hkv, D]."""
    if cache.dim() == 5:
        keys, values = cache.unbind(1)
    else:
        keys, values = cache.transpose(1, 2).split(head_size, -1)
    return keys, values
