# SPDX-License-Identifier: Apache-2.0
"""A vLLM load format: random weights under which the outputs still depend on every layer.

vLLM's own `dummy` format draws every weight from ±0.001. That is fine for timing, but the
layers then change the residual stream by less than bfloat16 resolves, and all tokens come out
equally likely: comparing outputs would prove nothing. Here, for a matrix with K inputs,

    weight ~ N(0, 1/K), embeddings and output head ~ N(0, LOGIT_STD²/K),
    norm weights = 1, biases ~ N(0, BIAS_STD²)

A draw depends only on the parameter's name, shape and dtype, so both variants get the same.
Quantization that vLLM does while it loads (`--quantization fp8`) has no memory for such a layer's
weights beforehand: they are drawn layer by layer, each is quantized before the next.

vLLM gets the module as `--worker-extension-cls`, so that every worker process imports it and knows
the format. It is imported in engine processes only.
"""

import zlib

import torch
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from workspace.bench.models import DUMMY_FORMAT, DUMMY_SEED
from workspace.bench.releases import loaded_layer

LOGIT_STD = 3.0
"""Standard deviation of the logits, in nats."""
BIAS_STD = 0.1


class WorkerExtension:
    """Adds nothing to a worker; naming it makes the worker import this module."""


@register_model_loader(DUMMY_FORMAT)
class ScaledDummyLoader(DummyModelLoader):
    """Builds the model as vLLM's dummy loader does and fills it with `fill`."""

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        names = {name for name, _ in model.named_parameters()}  # a tied weight has one
        for prefix, layer in model.named_modules():
            with loaded_layer(layer):
                for name, weight in layer.named_parameters(prefix, recurse=False):
                    if name in names and torch.is_floating_point(weight):
                        fill(name, weight.data)


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
