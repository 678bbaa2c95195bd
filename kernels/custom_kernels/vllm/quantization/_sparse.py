# SPDX-License-Identifier: Apache-2.0
"""Sparse 8-bit linear layers: y = dequant(Q(x) · Q(P(W))ᵀ) + b.

P keeps of every 2N consecutive weights the 2N-2 largest and sets the others to zero, or of half of
the rows every 2 of 4 (``mixed``, see ``sparsity``); Q quantizes,
the weight per output channel and the activation per token; the product runs on 2:4 tensor cores
(``custom_quant_expand``, ``custom_sparse_gemm``). float8 on GPUs that have it, int8 elsewhere.

Pruning by magnitude alone, without training after it, costs accuracy: it shows what a pattern costs
and saves in time, for any checkpoint. A checkpoint that was trained with the pattern keeps its
values: the weights that it has are the ones that are kept. One that is quantized already is loaded
as it is (``_stored.py``).

Under torch.compile x is quantized by the kernel that computes it, where that is a norm or an
activation (``upstream_fusion.py``), so that it is not written and read again; with
``CUSTOM_KERNELS_FUSE=0`` always by a kernel of its own.

With tensor parallelism each rank quantizes its part of the weight, with scales of its own. Where a
layer's K is split, the parts must be whole groups, so that any number of ranks prunes the same
weights.
"""

import logging
import os
from typing import Any, ClassVar, Protocol

import torch

from custom_kernels import registry, sparse_gemm, sparsity
from custom_kernels.quant_expand import custom_quant_expand
from custom_kernels.vllm import upstream
from custom_kernels.vllm.quantization import _base

FUSE = "CUSTOM_KERNELS_FUSE"
FUSED = ("rms_norm_quant", "silu_mul_quant")

log = logging.getLogger(__name__)

QUANTIZED = ("compressed-tensors", "sparse")
"""Methods of quantized checkpoints that a sparse method can load."""


class Sparse(Protocol):
    """What the linear method reads of its configuration."""

    pattern: str

    def get_name(self) -> str: ...


class SparseLinear(_base.LinearMethod):
    """Prunes and quantizes the weight of an unquantized layer while it is loaded."""

    config: Sparse

    def __init__(self, config: Sparse, dtype: torch.dtype | None = None) -> None:
        """``dtype``: of the quantized weight; None: the best of its device."""
        super().__init__(config)
        self.wanted = dtype
        if fuses():
            upstream.fuse_quantization(asked=FUSE in os.environ)

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        *others: Any,
        **attributes: Any,
    ) -> None:
        group = sparsity.pattern(self.config.pattern).group
        if input_size_per_partition != input_size and input_size_per_partition % group:
            raise ValueError(
                f"{self.config.get_name()}: {upstream.layer_name(layer)} has K={input_size}, of "
                f"which each rank gets {input_size_per_partition}, and these are no whole groups "
                f"of {group}; use fewer tensor-parallel ranks or another pattern"
            )
        sizes = (input_size_per_partition, output_partition_sizes, input_size)
        super().create_weights(layer, *sizes, *others, **attributes)

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        pruned = sparse_gemm.prune_weight(weight, self.config.pattern)
        return self.pack(*sparse_gemm.quantize_weight(pruned, self.dtype_on(weight.device)))

    def dtype_on(self, device: torch.device) -> torch.dtype:
        return self.wanted or best_dtype(device)

    def pack(self, values: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """What ``apply`` multiplies by. values [N, K] int8 or float8_e4m3fn with the zeros of the
        pattern, scale [N] float32. Raises ValueError if the zeros are not there."""
        name, dtype, device = self.config.get_name(), values.dtype, values.device
        packed = sparse_gemm.pack(values, self.config.pattern, scale)
        if values.is_cuda and packed.backend == "reference":
            log.warning("%s: no custom kernel runs on this GPU, only the reference", name)
        # Compiled and loaded now: while a CUDA graph is captured it would be too late.
        registry.operation("sparse_gemm").runner(packed.backend, device, dtype)
        for operation in ("quant_expand", *(FUSED if fuses() else ())):
            best = registry.operation(operation).best(device, torch.bfloat16)
            best.runner(device, torch.bfloat16)
        self.dtype, self.backend, self.features = dtype, packed.backend, packed.features
        self.expansion = packed.pattern.expansion
        # Constants of the graph: by what this machine can run, the checkpoint, and a variable.
        kind = f"{name} {self.config.pattern} {dtype} {packed.backend}"
        upstream.graphs_depend_on(f"{kind} fused {fuses()}")
        return {"values": packed.values, "metadata": packed.metadata, "scale": scale}

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        q, scale = custom_quant_expand(x, self.expansion, self.dtype)
        weight = layer.values, layer.metadata, layer.scale
        return torch.ops.custom_kernels.sparse_gemm.default(
            q, scale, *weight, bias, self.features, self.backend
        )


class SparseConfig(_base.Config):
    linear_method = SparseLinear
    pattern: ClassVar[str]

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take a quantized checkpoint where the user names this method."""
        asked = user_quant == cls.get_name() and hf_quant_cfg["quant_method"] in QUANTIZED
        return user_quant if asked else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> upstream.QuantizationConfig:
        """For a quantized checkpoint; vLLM makes a ``cls()`` for any other."""
        from custom_kernels.vllm.quantization import _checkpoint

        return _checkpoint.read(cls.get_name(), config, cls.pattern)


def best_dtype(device: torch.device) -> torch.dtype:
    """float8 where tensor cores take it: compute capability 8.9 and above."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return torch.float8_e4m3fn
    return torch.int8


def fuses() -> bool:
    """Whether x may be quantized in the kernel before: unless ``CUSTOM_KERNELS_FUSE=0``."""
    return os.environ.get(FUSE, "1") != "0"
