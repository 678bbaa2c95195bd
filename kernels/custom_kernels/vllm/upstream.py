# SPDX-License-Identifier: Apache-2.0
"""All that we read of vLLM's Python code beside its plugin interface. What differs between its
releases is settled here and nowhere else."""

from typing import Any

import torch
from vllm import envs
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

__all__ = ["LinearBase", "QuantizationConfig", "UnquantizedLinearMethod"]

OUTPUT_HEAD = "lm_head"


def wanted_backend() -> str | None:
    return envs.VLLM_CUSTOM_GEMM_BACKEND


def wanted_layers() -> str:
    return envs.VLLM_CUSTOM_GEMM_LAYERS or ""


def layer_name(layer: torch.nn.Module) -> str:
    """vLLM's name of a linear layer ("model.layers.3.mlp.gate_up_proj").

    The output head is called "lm_head" in every model: embeddings do not keep their name, and the
    head of a model with tied embeddings is its embedding.
    """
    if isinstance(layer, VocabParallelEmbedding):
        return OUTPUT_HEAD
    return getattr(layer, "prefix", "") or type(layer).__name__


def is_linear(layer: torch.nn.Module) -> bool:
    """False for an embedding, which multiplies only where it is the output head as well."""
    return isinstance(layer, ParallelLMHead) or not isinstance(layer, VocabParallelEmbedding)


def quantization_methods() -> list[str]:
    """Names of the quantization methods that vLLM knows."""
    return list(quantization.QUANTIZATION_METHODS)


def register_quantization(name: str, config: Any) -> None:
    quantization.register_quantization_config(name)(config)
