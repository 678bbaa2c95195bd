# SPDX-License-Identifier: Apache-2.0
"""One linear layer, a block of rows at a time: prune, quantize, and say what that cost.

    W' = dequantize(quantize(prune(W)))
    relative error = ‖W − W'‖ / ‖W‖,  weighted: every column k times norms[k] before

The weighted error estimates that of the layer's output, for inputs whose features are independent.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from custom_kernels.sparse_gemm import prune_weight, quantize_weight
from custom_kernels.sparsity import MIXED, MIXED_ROWS
from pydantic import BaseModel

from workspace.convert.description import Dtype
from workspace.host.errors import WorkspaceError

BLOCK = 1 << 19
"""Weights that one thread takes at a time; it needs about 20 bytes of memory for each."""
TORCH: dict[Dtype, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


class Error(BaseModel):
    """Sums of squares over the weights of a layer, or of several."""

    lost: float = 0.0
    """Of W − W'."""
    whole: float = 0.0
    """Of W."""
    weighted_lost: float = 0.0
    weighted_whole: float = 0.0

    @property
    def relative(self) -> float:
        return (self.lost / self.whole) ** 0.5 if self.whole else 0.0

    @property
    def weighted(self) -> float | None:
        """None if there were no norms."""
        return (self.weighted_lost / self.weighted_whole) ** 0.5 if self.weighted_whole else None


def total(errors: Iterable[Error]) -> Error:
    fields = [error.model_dump() for error in errors]
    return Error(**{name: sum(one[name] for one in fields) for name in Error.model_fields})


@dataclass(frozen=True)
class Converter:
    """Converts weights [N, K] by blocks of rows, which do not depend on each other."""

    pattern: str
    dtype: Dtype

    def blocks(self, weight: torch.Tensor) -> list[slice]:
        """The rows of each block."""
        n, k = weight.shape
        rows = max(1, BLOCK // k)
        if self.pattern == MIXED:  # rows are chosen within a block of so many
            rows = -(-rows // MIXED_ROWS) * MIXED_ROWS
        return [slice(first, min(first + rows, n)) for first in range(0, n, rows)]

    def __call__(
        self, name: str, weight: torch.Tensor, norms: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, Error]:
        """The weight of a block in 8 bits [n, K], its scale [n] float32, and the error.

        Args:
            name: the layer's, for messages.
            weight: [n, K] floating point.
            norms: [K] float32, or None for pruning by magnitude.

        Raises:
            WorkspaceError: the weight is not of floating point or not finite.
        """
        if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise WorkspaceError(f"{name} has weights of {weight.dtype}; use the original model")
        pruned = prune_weight(weight, self.pattern, norms)
        quantized, scale = quantize_weight(pruned, TORCH[self.dtype])
        error = _error(weight.float(), quantized, scale.unsqueeze(1), norms)
        if not math.isfinite(error.lost + error.whole):
            raise WorkspaceError(f"{name} has weights that are not finite; the model is damaged")
        return quantized, scale, error


def _error(
    source: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor, norms: torch.Tensor | None
) -> Error:
    if quantized.dtype == torch.int8:
        values = quantized.float()
    else:  # the bits of a float8_e4m3fn, as those of a float16 that is 2^-8 of it: torch takes
        # twenty times as long
        half = quantized.view(torch.int8).to(torch.int16).__ilshift__(7)
        half &= -0x4080  # the sign, of which there are two now, the exponent, the mantissa
        values, scale = half.view(torch.float16).float(), scale * 256
    lost = torch.addcmul(source, values, scale, value=-1)
    both = [lost, source]
    if norms is not None:
        both += [lost * norms, source * norms]
    sums = [torch.linalg.vector_norm(values).item() ** 2 for values in both]
    return Error(**dict(zip(Error.model_fields, sums, strict=False)))


def threads() -> ThreadPoolExecutor:
    """For `Converter`: one thread for each core that this process may use, at most 16."""
    count = min(len(os.sched_getaffinity(0)), 16)
    # glibc keeps freed memory up to the size of the largest block that it was given back so far,
    # at most 32 MB; else each intermediate value comes from the system anew, which takes as long
    # again as computing it.
    torch.empty(30 << 20, dtype=torch.uint8)
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
