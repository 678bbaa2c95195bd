# SPDX-License-Identifier: Apache-2.0
"""What a worker of vLLM tells about itself: named as `--worker-extension-cls`, vLLM makes it a base
of its workers. It is imported in engine processes only."""

from typing import Any


class WorkerExtension:
    """Called by name in every worker, `LLM.collective_rpc("attention_backends")`."""

    vllm_config: Any

    def attention_backends(self) -> list[str]:
        """vLLM's names of those that this worker's layers have, sorted. One of ours has the name
        of what it replaces."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        asked = (getattr(layer, "get_attn_backend", None) for layer in layers)
        return sorted({ask().get_name() for ask in asked if ask is not None})
