# SPDX-License-Identifier: Apache-2.0
"""Sparse 8-bit linear layers: y = dequant(Q(x) · Q(P(W))ᵀ) + b.

P keeps of every 2N consecutive weights the 2N-2 largest and sets the others to zero; Q quantizes,
the weight per output channel and the activation per token; the product runs on 2:4 tensor cores
(``custom_quant_expand``, ``custom_sparse_gemm``). float8 on GPUs that have it, int8 elsewhere.

Pruning by magnitude alone, without training after it, costs accuracy: it shows what a pattern costs
and saves in time, for any checkpoint. A checkpoint that was trained with the pattern keeps its
values: the weights that it has are the ones that are kept.

Under torch.compile the compiler gets the quantization as plain torch, where the pattern's expansion
is the row itself (2:4, K a multiple of 64): it becomes part of the kernel that computes x, a norm
or an activation, so x is not written and read again. Such a kernel quantizes x as it was before it
was rounded to bfloat16. ``CUSTOM_KERNELS_FUSE=0`` turns it off.

With tensor parallelism each rank quantizes its part of the weight, with scales of its own. Where a
layer's K is split, the parts must be whole groups, so that any number of ranks prunes the same
weights.
"""

import logging
import os
from typing import Any, ClassVar

import torch

from custom_kernels import quantization, registry, sparse_gemm, sparsity
from custom_kernels.quant_expand import custom_quant_expand
from custom_kernels.vllm import upstream
from custom_kernels.vllm.quantization import _base

FUSE = "CUSTOM_KERNELS_FUSE"

log = logging.getLogger(__name__)


class SparseLinear(_base.LinearMethod):
    config: "SparseConfig"

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
        name, pattern = self.config.get_name(), self.config.pattern
        dtype = best_dtype(weight.device)
        values, scale = sparse_gemm.quantize_weight(
            sparse_gemm.prune_weight(weight, pattern), dtype
        )
        packed = sparse_gemm.pack(values, pattern, scale)
        if weight.is_cuda and packed.backend == "reference":
            log.warning("%s: no custom kernel runs on this GPU, only the reference", name)
        # Compiled and loaded now: while a CUDA graph is captured it would be too late.
        registry.operation("sparse_gemm").runner(packed.backend, weight.device, dtype)
        registry.operation("quant_expand").best(weight.device, weight.dtype).runner(
            weight.device, weight.dtype
        )
        self.dtype, self.backend, self.features = dtype, packed.backend, packed.features
        self.fused = fuses() and packed.expanded == packed.k
        # Constants of the graph that depend on what this machine can run, and on a variable.
        upstream.graphs_depend_on(f"{name} {dtype} {packed.backend} fused {self.fused}")
        return {"values": packed.values, "metadata": packed.metadata, "scale": scale}

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.fused and torch.compiler.is_compiling():
            q, scale = quantization.quantize(x, self.dtype)
        else:
            q, scale = custom_quant_expand(x, self.config.pattern, self.dtype)
        weight = layer.values, layer.metadata, layer.scale
        return torch.ops.custom_kernels.sparse_gemm.default(
            q, scale, *weight, bias, self.features, self.backend
        )


class SparseConfig(_base.Config):
    linear_method = SparseLinear
    pattern: ClassVar[str]


def best_dtype(device: torch.device) -> torch.dtype:
    """float8 where tensor cores take it: compute capability 8.9 and above."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return torch.float8_e4m3fn
    return torch.int8


def fuses() -> bool:
    """Whether ``CUSTOM_KERNELS_FUSE`` leaves the quantization to torch.compile: if it is not 0."""
    return os.environ.get(FUSE, "1") != "0"
