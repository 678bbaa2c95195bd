# SPDX-License-Identifier: Apache-2.0
"""All that we read of vLLM's compressed-tensors method. Imported when a quantized checkpoint is
loaded and not before: it imports every quantized kernel of vLLM."""

import torch
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.quantization.compressed_tensors import schemes
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.utils import (
    find_matched_target,
    should_ignore_layer,
)

__all__ = ["CompressedTensorsConfig"]

RUNS_MARLIN_24 = hasattr(schemes, "CompressedTensorsW4A16Sparse24")
"""vLLM 0.13.0 has kernels for it, 0.25.1 has none."""

_EXPERTS = getattr(fused_moe, "RoutedExperts", None) or fused_moe.FusedMoE


def is_experts(layer: torch.nn.Module) -> bool:
    return isinstance(layer, _EXPERTS)


def matches(
    layer: torch.nn.Module, name: str, targets: list[str], fused: dict[str, list[str]]
) -> bool:
    """Whether a layer, or every part of a merged one, is among ``targets``, as compressed-tensors
    means them: names of layers, ``re:`` patterns of names, names of classes."""
    try:
        return find_matched_target(name, layer, targets, fused) is not None
    except ValueError:  # of vLLM 0.13.0, for no match
        return False


def is_ignored(name: str, ignore: list[str], fused: dict[str, list[str]]) -> bool:
    """Whether a layer is in a list of layers to leave out."""
    return bool(should_ignore_layer(name, ignore=ignore, fused_mapping=fused))
