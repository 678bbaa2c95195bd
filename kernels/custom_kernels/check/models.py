# SPDX-License-Identifier: Apache-2.0
"""The models at whose shapes operations are measured, from their published configurations."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """What of a model's configuration decides its linear layers."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    qkv_bias: bool

    def layers(self) -> dict[str, tuple[int, int, bool]]:
        """Name: (N, K, has a bias)."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_size
        return {
            "qkv": (qkv, self.hidden, self.qkv_bias),
            "o": (self.hidden, self.heads * self.head_size, False),
            "gate_up": (2 * self.intermediate, self.hidden, False),
            "down": (self.hidden, self.intermediate, False),
            "lm_head": (self.vocabulary, self.hidden, False),
        }


MODELS = {
    "qwen2.5-0.5b": Model(896, 4864, 14, 2, 64, 151936, True),
    "qwen2.5-1.5b": Model(1536, 8960, 12, 2, 128, 151936, True),
    "qwen2.5-7b": Model(3584, 18944, 28, 4, 128, 152064, True),
    "llama-3.2-1b": Model(2048, 8192, 32, 8, 64, 128256, False),
}
DEFAULT_MODELS = ("qwen2.5-0.5b", "qwen2.5-7b")
