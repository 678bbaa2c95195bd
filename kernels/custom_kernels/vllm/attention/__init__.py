# SPDX-License-Identifier: Apache-2.0
"""Attention by ``custom_kernels.paged_attention`` where every sequence has one token to decode.

``VLLM_CUSTOM_OPS=paged_attention``, perhaps with a backend, puts classes of ours in the places of
vLLM's own attention backends (its registry, ``register_backend``), each a subclass of what it
replaces: FlashAttention and Triton on GPUs, the one for CPUs. Whatever vLLM chooses among them then
decodes by our operation, and does all else as it did. vLLM's name for a backend from outside,
``--attention-backend CUSTOM``, is FlashAttention with our decode: on GPUs where vLLM would choose a
backend that is not among those, that names it.
"""

OPERATION = "paged_attention"

PLACES = {
    "FLASH_ATTN": "gpu.FlashAttention",
    "TRITON_ATTN": "gpu.TritonAttention",
    "CPU_ATTN": "cpu.CPUAttention",
    "CUSTOM": "gpu.FlashAttention",
}
"""vLLM's name of a backend → our class, which is imported when vLLM chooses it."""


def register(backend: str | None) -> None:
    """Put our classes in the places of vLLM's, with this backend of our operation or the best.

    Raises RuntimeError on a release without that registry.
    """
    from custom_kernels.vllm import upstream_attention
    from custom_kernels.vllm.attention._decode import Decode

    Decode.backend = backend
    for name, place in PLACES.items():
        upstream_attention.replace_backend(name, f"{__name__}.{place}")
