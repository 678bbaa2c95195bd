# SPDX-License-Identifier: Apache-2.0
"""The plugin that vLLM loads in each of its processes (entry point group vllm.general_plugins)."""

from custom_kernels import registry, shipped
from custom_kernels.vllm import capture, ir_ops, layers, quantization

PLUGIN = f"{__name__}:register"
"""The entry point's value."""


def register() -> None:
    """Make every operation known to torch; every quantization method, the wanted layers and our
    implementations of IR ops to vLLM; and tell the operations that an engine starts. Count the
    shapes of its steps if that is wanted. Compiles nothing."""
    from custom_kernels.vllm import upstream, upstream_cpu, upstream_hook

    shipped.warn(PLUGIN, upstream.VERSION)
    upstream_cpu.fix()
    upstream_hook.put_in()
    for operation in registry.operations():
        if hasattr(operation.module, "on_engine_start"):
            operation.module.on_engine_start()
    quantization.register()
    layers.register()
    ir_ops.register()
    if (folder := capture.folder()) is not None:
        from custom_kernels.vllm import upstream_capture

        upstream_capture.put_in(folder)
