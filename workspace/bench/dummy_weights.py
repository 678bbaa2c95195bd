# SPDX-License-Identifier: Apache-2.0
"""A vLLM load format: random weights under which the outputs still depend on every layer.

vLLM's own `dummy` format draws every weight from ±0.001. That is fine for timing, but the
layers then change the residual stream by less than bfloat16 resolves, and all tokens come out
equally likely: comparing outputs would prove nothing. Here, for a matrix with K inputs,

    weight ~ N(0, 1/K), embeddings and output head ~ N(0, LOGIT_STD²/K),
    norm weights = 1, biases ~ N(0, BIAS_STD²)

A draw depends only on the parameter's name, shape and dtype, so both variants get the same.
Quantization that vLLM does while it loads (`--quantization fp8`) has no memory for such a layer's
weights beforehand: they are drawn layer by layer, each is quantized before the next. Where a
checkpoint would hold 8-bit weights with a scale per output channel, the weight is drawn in the
model's dtype, pruned to the pattern in the loader's configuration, and quantized: whichever method
loads the layer, sparse or dense, has the same numbers.

vLLM gets the module as `--worker-extension-cls`, so that every worker process imports it and knows
the format. It is imported in engine processes only.
"""

import zlib
from dataclasses import replace

import torch
from custom_kernels.sparse_gemm import prune_weight, quantize_weight
from vllm.config import LoadConfig, ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from workspace.bench import worker
from workspace.bench.models import DUMMY_FORMAT, DUMMY_SEED
from workspace.bench.releases import loaded_layer

LOGIT_STD = 3.0
"""Standard deviation of the logits, in nats."""
BIAS_STD = 0.1


class WorkerExtension(worker.WorkerExtension):
    """Naming it makes the worker import this module."""


@register_model_loader(DUMMY_FORMAT)
class ScaledDummyLoader(DummyModelLoader):
    """Builds the model as vLLM's dummy loader does and fills it with `fill`."""

    def __init__(self, load_config: LoadConfig) -> None:
        options = load_config.model_loader_extra_config
        self.pattern = options.get("pattern") if isinstance(options, dict) else None
        super().__init__(replace(load_config, model_loader_extra_config={}))

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        names = {name for name, _ in model.named_parameters()}  # a tied weight has one
        for prefix, layer in model.named_modules():
            stored = stored_in_8_bits(layer)
            if stored is not None:
                fill_quantized(f"{prefix}.weight", *stored, self.pattern, model_config.dtype)
            kept = [id(tensor) for tensor in stored or ()]
            with loaded_layer(layer):
                for name, weight in layer.named_parameters(prefix, recurse=False):
                    if name in names and weight.is_floating_point() and id(weight) not in kept:
                        fill(name, weight.data)


def stored_in_8_bits(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The weight [N, K] of a layer whose checkpoint holds it in 8 bits, and its scale [N, 1]."""
    weight, scale = (getattr(layer, name, None) for name in ("weight", "weight_scale"))
    if not isinstance(weight, torch.Tensor) or not isinstance(scale, torch.Tensor):
        return None
    return (weight, scale) if weight.itemsize == 1 else None


def fill_quantized(
    name: str, weight: torch.Tensor, scale: torch.Tensor, pattern: str | None, dtype: torch.dtype
) -> None:
    """Fill an 8-bit weight and its scale in place: what `fill` draws for a weight of this dtype,
    pruned to the pattern, if there is one, and quantized."""
    drawn = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    fill(name, drawn)
    if pattern:
        drawn = prune_weight(drawn, pattern)
    values, scales = quantize_weight(drawn, weight.dtype)
    weight.data.copy_(values)
    scale.data.copy_(scales.view_as(scale))


def fill(name: str, weight: torch.Tensor) -> None:
    """Fill one parameter in place.

    Args:
        name: its full name in the model; decides role and random stream.
        weight: float tensor, any device; [out, in] for matrices, [n] for norms and biases.
    """
    generator = torch.Generator(device=weight.device)
    generator.manual_seed(DUMMY_SEED + zlib.crc32(name.encode()))
    if name.endswith("bias"):
        weight.normal_(0.0, BIAS_STD, generator=generator)
    elif weight.dim() < 2:
        weight.fill_(1.0)
    else:
        gain = LOGIT_STD if "embed" in name or "lm_head" in name else 1.0
        weight.normal_(0.0, gain * weight.shape[-1] ** -0.5, generator=generator)
