# SPDX-License-Identifier: Apache-2.0
"""What a worker of vLLM tells about itself: named as `--worker-extension-cls`, vLLM makes it a base
of its workers. It is imported in engine processes only."""

import os
from typing import Any

LAYER = "layer: "
"""Begins the name of a range in a profiler's trace; the layer's name follows."""
HEAD, SAMPLER = "logits_processor", "sampler"
"""What multiplies with the output head, and what chooses the next tokens; the second is no part of
the model."""


class WorkerExtension:
    """Called by name in every worker, `LLM.collective_rpc("attention_backends")`."""

    vllm_config: Any
    model_runner: Any

    def attention_backends(self) -> list[str]:
        """vLLM's names of those that this worker's layers have, sorted. One of ours has the name
        of what it replaces."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        asked = (getattr(layer, "get_attn_backend", None) for layer in layers)
        return sorted({ask().get_name() for ask in asked if ask is not None})

    def launched(self) -> tuple[dict[str, int], dict[str, dict[str, int]], dict[str, Any]]:
        """What this process launched, by kernel, by layer, and by kernel and number of tokens."""
        from custom_kernels import launches

        log, pid = os.environ[launches.ENVIRONMENT], os.getpid()
        counts, layers = launches.read(log).get(pid, {}), launches.read_layers(log).get(pid, {})
        return counts, layers, launches.read_tokens(log).get(pid, {})

    def name_layers_in_traces(self, *, eager: bool) -> None:
        """Let the modules of the model, and the sampler, put a range with their name around what
        they do; of a compiled model only those that run outside of what is compiled."""
        named = dict(self.model_runner.model.named_modules())
        if not eager:
            named = {name: named[name] for name in (HEAD,) if name in named}
        named[SAMPLER] = self.model_runner.sampler
        for name, module in named.items():
            if name and hasattr(module, "register_forward_hook"):
                _put_range_around(module, LAYER + name)

    def linear_layers(self) -> list[dict[str, Any]]:
        """The linear layers of the model and its output head, in the order of the modules: name, N,
        K, and bytes of everything that they hold, as weights, scales and biases are."""
        from custom_kernels.vllm import upstream

        found = []
        for name, module in self.model_runner.model.named_modules():
            if not upstream.is_linear_layer(module):
                continue
            held = [*module.parameters(), *module.buffers()]
            n = getattr(module, "output_size_per_partition", None)
            k = getattr(module, "input_size_per_partition", None)
            if n is None or k is None:  # the output head is an embedding
                n, k = module.num_embeddings_per_partition, module.embedding_dim
            size = sum(tensor.numel() * tensor.itemsize for tensor in held)
            found.append({"name": name, "n": n, "k": k, "bytes": size})
        return found

    def ceilings(self, dtypes: list[str]) -> dict[str, Any]:
        """What this worker's GPU reaches with copies and with dense products in these dtypes;
        nothing if the engine left too little memory to try."""
        import torch
        from custom_kernels.bench import device

        gpu = torch.device("cuda", torch.cuda.current_device())
        try:
            return device.ceilings(gpu, dtypes).model_dump()
        except torch.OutOfMemoryError:
            return {}


def _put_range_around(module: Any, name: str) -> None:
    from torch.profiler import record_function

    ranges: list[Any] = []

    def enter(*_: Any) -> None:
        ranges.append(record_function(name))
        ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)
