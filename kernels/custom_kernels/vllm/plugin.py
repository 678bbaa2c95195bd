# SPDX-License-Identifier: Apache-2.0
"""The plugin that vLLM loads in each of its processes (entry point group vllm.general_plugins)."""

from custom_kernels import registry
from custom_kernels.vllm import quantization


def register() -> None:
    """Make every operation known to torch and every quantization method to vLLM, and tell the
    operations that an engine starts. Compiles nothing."""
    from custom_kernels.vllm import upstream_cpu

    upstream_cpu.let_slots_be_mapped()
    for operation in registry.operations():
        if hasattr(operation.module, "on_engine_start"):
            operation.module.on_engine_start()
    quantization.register()
