# SPDX-License-Identifier: Apache-2.0
"""All that we read of vLLM's Python code beside its plugin interface. What differs between its
releases is settled here and nowhere else."""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import vllm
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers import linear, quantization
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)
from vllm.platforms import current_platform

from custom_kernels import registry
from custom_kernels.source_hash import source_hash

log = logging.getLogger(__name__)

__all__ = [
    "BasevLLMParameter",
    "ChannelQuantScaleParameter",
    "LinearBase",
    "ModelWeightParameter",
    "PerTensorScaleParameter",
    "QuantizationConfig",
    "UnquantizedLinearMethod",
]

OUTPUT_HEAD = "lm_head"
VERSION: str = vllm.__version__

FUSED_QUANTIZATIONS = {"rms_norm_quant", "silu_mul_quant"}

_graph_facts: set[str] = set()


def wants_gemm() -> bool:
    """Whether unquantized linear layers run our GEMM."""
    return os.environ.get("VLLM_USE_CUSTOM_GEMM") == "1"


def wanted_backend() -> str | None:
    """Which GEMM backend runs the layers; None picks the best for the device."""
    return os.environ.get("VLLM_CUSTOM_GEMM_BACKEND") or None


def wanted_layers() -> str:
    """Patterns with commas of the layers that run our GEMM; empty takes them all."""
    return os.environ.get("VLLM_CUSTOM_GEMM_LAYERS", "")


def wanted_ops() -> str:
    """Operations with commas that run layers of vLLM, each perhaps with ``.backend``."""
    return os.environ.get("VLLM_CUSTOM_OPS", "")


def wanted_op_layers() -> str:
    """Patterns with commas of the layers that run these operations; empty takes them all."""
    return os.environ.get("VLLM_CUSTOM_OPS_LAYERS", "")


# Like the switch VLLM_USE_CUSTOM_GEMM, which is the fork's, in vLLM's key for compiled graphs.
envs.environment_variables |= {
    "VLLM_CUSTOM_GEMM_BACKEND": wanted_backend,
    "VLLM_CUSTOM_GEMM_LAYERS": wanted_layers,
    "VLLM_CUSTOM_OPS": wanted_ops,
    "VLLM_CUSTOM_OPS_LAYERS": wanted_op_layers,
}


def needs_own_gemm() -> bool:
    """Whether vLLM is to compute the same bits for any batch, which only its own GEMM does."""
    return os.getenv("VLLM_BATCH_INVARIANT", "0") != "0" and not current_platform.is_cpu()


def packs_weights() -> bool:
    """Whether vLLM packs the weights of linear layers, and may drop the plain ones or widen a
    bias."""
    return current_platform.is_cpu()


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


def is_linear_layer(module: torch.nn.Module) -> bool:
    """Whether a module of a model is a linear layer or the output head."""
    return isinstance(module, LinearBase | ParallelLMHead)


def is_attention(module: torch.nn.Module) -> bool:
    """Whether it is attention to a KV cache."""
    return isinstance(module, AttentionLayerBase)


def operation_name(module: torch.nn.Module) -> str | None:
    """vLLM's name of the operation that a layer class is ("rms_norm"), which can be replaced."""
    return getattr(type(module), "name", None) if isinstance(module, CustomOp) else None


class AfterLoading(QuantizeMethodBase):
    """The ``quant_method`` of a layer that calls ``then`` when the whole model has its weights."""

    supports_pre_processed_weights = True
    requires_device_loading = False

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def create_weights(self, layer: torch.nn.Module, *arguments: Any, **more: Any) -> None:
        """The layer has its weights already."""

    def apply(self, layer: torch.nn.Module, *arguments: Any, **more: Any) -> torch.Tensor:
        """Such a layer has a ``forward`` of its own."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._then()


def replace_layer(replaced: type, layer: type) -> None:
    """Let vLLM build ``layer``, a subclass, where a model asks for ``replaced``.

    Raises RuntimeError if another plugin has replaced it.
    """
    name = getattr(replaced, "name", None)
    try:
        CustomOp.register_oot(name=replaced.__name__)(layer)
    except AssertionError:
        raise RuntimeError(
            f"VLLM_CUSTOM_OPS: another plugin has replaced {replaced.__name__} already; leave out "
            "one of the two (VLLM_PLUGINS names those that are loaded)"
        ) from None
    # By this name vLLM's setting custom_ops turns on and off what the layer runs if it is not ours.
    layer.name = name  # type: ignore[attr-defined]


def quantization_methods() -> list[str]:
    """Names of the quantization methods that vLLM knows."""
    return list(quantization.QUANTIZATION_METHODS)


def register_quantization(name: str, config: Any) -> None:
    quantization.register_quantization_config(name)(config)


def shards_by_parameter(method: type) -> type:
    """A class decorator: the parameters that this linear method creates know how they are sharded
    and merged, by their classes."""
    linear.WEIGHT_LOADER_V2_SUPPORTED.append(method.__name__)
    return method


def draws_weights() -> bool:
    """Whether the model that is being built gets random weights instead of a checkpoint's."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    loader = get_model_loader(get_current_vllm_config().load_config)
    return isinstance(loader, DummyModelLoader)


def graphs_depend_on(fact: str) -> None:
    """Make ``fact`` part of vLLM's key for compiled graphs: one that was compiled without it is
    never reused. To be called before the model's first forward pass, in each process."""
    _graph_facts.add(fact)
    # The key holds the values of all variables that are registered here. This one is not read from
    # the environment.
    envs.environment_variables["CUSTOM_KERNELS_GRAPHS"] = lambda: ", ".join(sorted(_graph_facts))


def fuse_quantization(asked: bool) -> None:
    """Put a pass that fuses quantization into the compilation of the model that is being built; say
    in one line why, if that was asked for and cannot be."""
    config = get_current_vllm_config().compilation_config
    if not getattr(config, "ir_enable_torch_wrap", False):
        mode = getattr(config.mode, "name", config.mode)
        if asked:
            _say_once(f"vLLM's passes do not see norms here (compilation mode {mode})")
        return
    here = set(map(str, registry.operations()))
    if absent := FUSED_QUANTIZATIONS - here:  # from a wheel
        if asked:
            _say_once(f"this package holds no {' and no '.join(sorted(absent))}")
        return
    from custom_kernels.vllm.upstream_fusion import FuseQuantization

    passes, key = config.inductor_compile_config, current_platform.pass_key
    if not isinstance(passes.setdefault(key, FuseQuantization()), FuseQuantization):
        _say_once(f"{key} is set to another pass")


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("CUSTOM_KERNELS_FUSE=1: nothing is fused: %s", reason)


def _key_graphs_by_sources() -> None:
    # A graph is compiled for the output layouts that the fake implementations of our ops promise,
    # but holds only the ops' names: neither vLLM's key nor torch's own, for the caches below
    # vLLM's, would see an edit.
    sources = source_hash()
    graphs_depend_on(f"sources {sources}")
    torch.compiler.config.cache_key_tag += sources


# On import, because whatever brings our ops into vLLM imports this module, the plugin or not.
_key_graphs_by_sources()
