# SPDX-License-Identifier: Apache-2.0
"""The linear layers of real models: where GEMM is measured.

Shapes follow from the models' published configurations; query, key and value are one layer, gate
and up another, as vLLM runs them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from custom_kernels.timing import Case

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""M: a decode step has as many rows as there are running requests, a prefill step up to vLLM's
batch limit."""

TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
"""‖out - exact‖ / ‖exact‖: rounding the output once to 8 or 11 bits gives about 1.7e-3 or
2.1e-4."""


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


def cases(models: Sequence[str], tokens: Sequence[int], dtype: torch.dtype) -> Iterator[Case]:
    """Every layer of ``models`` at every M of ``tokens``."""
    for name in models:
        for layer, (n, k, has_bias) in MODELS[name].layers().items():
            for m in tokens:
                yield case(
                    {"model": name, "layer": layer, "M": m, "N": n, "K": k},
                    m,
                    n,
                    k,
                    has_bias,
                    dtype,
                )


def case(
    labels: dict[str, str | int], m: int, n: int, k: int, has_bias: bool, dtype: torch.dtype
) -> Case:
    """x of variance 1 and weights of variance 1/K, so that outputs have variance about 1 at every
    shape."""

    def empty_inputs(device: torch.device) -> tuple[torch.Tensor | None, ...]:
        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return empty(m, k), empty(n, k), empty(n) if has_bias else None

    def fill(inputs: Sequence[torch.Tensor | None]) -> None:
        for tensor, deviation in zip(inputs, (1.0, k**-0.5, 1.0), strict=True):
            if tensor is not None:
                tensor.normal_(0, deviation)

    item = dtype.itemsize
    return Case(
        labels=labels,
        empty_inputs=empty_inputs,
        fill=fill,
        flops=2.0 * m * n * k,
        bytes=float(item * (m * k + n * k + m * n + (n if has_bias else 0))),
        tolerance=TOLERANCES[dtype],
    )
