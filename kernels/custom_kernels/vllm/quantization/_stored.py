# SPDX-License-Identifier: Apache-2.0
"""A sparse linear layer whose weight comes from the checkpoint as it is: no value is changed.

Tensors of a layer [N, K] in a checkpoint:

- ``weight`` [N, K] int8, float8_e4m3fn or bfloat16, dense: the zeros are stored. As SlideSparse
  writes it, [N, K']: every window of every group in turn, K' a multiple of 32 (``unslide``).
- or ``compressed`` [N, K/2] and ``bitmask`` [N, K/8], the values that are not zero and where they
  are, and ``shape`` (``from_bitmask``): compressed-tensors' sparse-24-bitmask, of which versions
  before 0.15 wrote and read it.
- ``weight_scale`` [N, 1] or [1], for 8 bits; a merged layer has one [1] for each of its parts.
- ``input_scale`` [1], of activations quantized per tensor beforehand: read, and not used.

With tensor parallelism vLLM's parameters hold this rank's part of each.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from custom_kernels import sparse_gemm, sparsity
from custom_kernels.vllm import upstream
from custom_kernels.vllm.quantization._sparse import Sparse, SparseLinear

SLID_MULTIPLE = 32
"""Values: SlideSparse pads its rows to this."""
UNSET = 0x7F
"""Every byte of the first and the last row of each part of a layer until it is loaded."""

Loader = Callable[..., None]


@dataclass(frozen=True)
class Storage:
    """How a layer is stored."""

    dtype: torch.dtype | None
    """int8 or float8_e4m3fn; None: not quantized, in the model's dtype."""
    per_tensor: bool = False
    """One weight scale instead of one for each output channel."""
    static: bool = False
    """With a scale for activations."""
    bitmask: bool = False
    slides: bool = False


@upstream.shards_by_parameter
class StoredLinear(SparseLinear):
    def __init__(self, config: Sparse, storage: Storage, parts: list[str]) -> None:
        """``parts``: the names of the layers that this one merges, in their order, or none."""
        super().__init__(config, storage.dtype)
        self.storage, self.parts = storage, parts

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        *others: Any,
        **attributes: Any,
    ) -> None:
        sizes = (input_size_per_partition, output_partition_sizes, input_size)
        super().create_weights(layer, *sizes, *others, **attributes)
        storage, loader = self.storage, attributes["weight_loader"]
        rows, k = sum(output_partition_sizes), input_size_per_partition
        self.layer, self.k, self.widths = upstream.layer_name(layer), k, output_partition_sizes
        if storage.bitmask and k != input_size and k % 8:
            raise ValueError(
                f"{self._name()} has K={input_size}, of which each rank gets {k}, and a bitmask "
                "has 8 in a byte; use fewer tensor-parallel ranks"
            )
        assert isinstance(layer.weight, torch.Tensor)
        dtype = storage.dtype or layer.weight.dtype
        del layer.weight
        both = {"input_dim": 1, "output_dim": 0}
        weight = self._as_stored(loader, dtype, input_size)
        if storage.bitmask:
            layer.compressed = upstream.ModelWeightParameter(
                data=unset(output_partition_sizes, k // 2, dtype), weight_loader=weight, **both
            )
            layer.bitmask = upstream.ModelWeightParameter(
                data=torch.zeros(rows, -(-k // 8), dtype=torch.uint8), weight_loader=loader, **both
            )
            layer.shape = upstream.BasevLLMParameter(
                data=torch.zeros(2, 1, dtype=torch.int64), weight_loader=loader
            )
        else:
            layer.weight = upstream.ModelWeightParameter(
                data=unset(output_partition_sizes, k, dtype), weight_loader=weight, **both
            )
        if storage.dtype is not None and storage.per_tensor:
            layer.weight_scale = per_part(output_partition_sizes, loader)
        elif storage.dtype is not None:
            layer.weight_scale = upstream.ChannelQuantScaleParameter(
                data=torch.full((rows, 1), torch.nan, dtype=torch.float32),
                output_dim=0,
                weight_loader=loader,
            )
        if storage.static:
            layer.input_scale = per_part(output_partition_sizes, loader)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        stored = {name: tensor.data for name, tensor in layer.named_parameters(recurse=False)}
        if self.storage.bitmask:
            weight = self._from_bitmask(stored["compressed"], stored["bitmask"])
        else:
            weight = stored["weight"]
        for name, part in self._parts(stored["compressed" if self.storage.bitmask else "weight"]):
            if is_unset(part):
                raise ValueError(f"{name} has no weight, or not all of it, in the checkpoint")
        if self.storage.dtype is None:
            values, scale = sparse_gemm.quantize_weight(weight, self.dtype_on(weight.device))
        else:
            values, scale = weight, self._scale(stored["weight_scale"])
        try:
            tensors = self.pack(values, scale)
        except ValueError as error:
            raise self._violation(values) or error from None
        self.keep(layer, tensors)

    def _as_stored(self, loader: Loader, dtype: torch.dtype, whole: int) -> Loader:
        """vLLM's loader of a weight, with what it takes for granted checked, for K = ``whole``."""

        def load(parameter: torch.nn.Parameter, loaded: torch.Tensor, *shard: Any) -> None:
            if self.storage.dtype is not None and loaded.dtype != dtype:
                raise ValueError(
                    f"{self._name()} should be {dtype} by config.json, and its weight in the "
                    f"checkpoint is {loaded.dtype}"
                )
            if self.storage.slides and loaded.shape[1] != whole:
                try:
                    loaded = unslide(loaded, sparsity.pattern(self.config.pattern), whole)
                except ValueError as error:
                    raise ValueError(f"{self._name()}: {error}") from None
            loader(parameter, loaded, *shard)

        return load

    def _from_bitmask(self, compressed: torch.Tensor, bitmask: torch.Tensor) -> torch.Tensor:
        try:
            return from_bitmask(compressed, bitmask, self.k)
        except ValueError as error:
            raise ValueError(f"{self._name()}: {error}") from None

    def _scale(self, stored: torch.Tensor) -> torch.Tensor:
        """[N] float32, of each output channel."""
        if self.storage.per_tensor:
            if stored[1:].isnan().all():  # the checkpoint has the parts as one
                stored = stored[:1].expand(len(self.widths))
            widths = torch.tensor(self.widths, device=stored.device)
            stored = stored.repeat_interleave(widths)
        if stored.isnan().any():
            raise ValueError(f"{self._name()} has no weight_scale, or part of one, to load")
        return stored.flatten()

    def _violation(self, values: torch.Tensor) -> ValueError | None:
        """What is wrong with a weight that cannot be packed, in the first part where it is."""
        for name, part in self._parts(values):
            try:
                sparse_gemm.pack(part, self.config.pattern, torch.ones_like(part[:, 0].float()))
            except ValueError as error:
                text = str(error).removeprefix("sparse_gemm: ")
                return ValueError(
                    f"{name}: {text}; name the pattern that it has, or prune it with make convert"
                )
        return None

    def _parts(self, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The rows of each part, and what to call it."""
        names = [f"{self._name()} ({part})" for part in self.parts]
        if len(names) != len(self.widths):  # it is merged in the checkpoint, too
            names = [self._name()] * len(self.widths)
        return zip(names, weight.split(self.widths), strict=True)

    def _name(self) -> str:
        return f"{self.config.get_name()}: {self.layer}"


def unset(widths: list[int], columns: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, columns] of parts with ``widths`` rows, of which the edges are marked: to fill all of
    it would take as long as to load it."""
    weight = torch.empty((sum(widths), columns), dtype=dtype)
    for part in weight.split(widths):
        part[:1].view(torch.uint8).fill_(UNSET)
        part[-1:].view(torch.uint8).fill_(UNSET)
    return weight


def is_unset(part: torch.Tensor) -> bool:
    return bool(part.numel()) and any(
        bool((row.view(torch.uint8) == UNSET).all()) for row in (part[0], part[-1])
    )


def per_part(widths: list[int], loader: Loader) -> torch.nn.Parameter:
    """One scale for each part of a merged layer."""
    data = torch.full((len(widths),), torch.nan, dtype=torch.float32)
    return upstream.PerTensorScaleParameter(data=data, weight_loader=loader)


def from_bitmask(compressed: torch.Tensor, bitmask: torch.Tensor, k: int) -> torch.Tensor:
    """[N, K] of compressed [N, K/2] and bitmask [N, K/8]: where bit k % 8 of byte k // 8 of a row
    is set, the next value of the row. Raises ValueError where a row has not K/2 bits."""
    bits = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    mask = (bitmask.unsqueeze(-1) >> bits & 1).flatten(1)[:, :k].bool()
    wrong = (mask.sum(-1) != compressed.shape[1]).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"the bitmask of row {row} has {int(mask[row].sum())} bits for "
            f"{compressed.shape[1]} values"
        )
    moved = compressed.view(torch.uint8) if compressed.dtype.itemsize == 1 else compressed
    return moved.new_zeros(mask.shape).masked_scatter_(mask, moved).view(compressed.dtype)


def unslide(weight: torch.Tensor, pattern: sparsity.Pattern, k: int) -> torch.Tensor:
    """[n, K] of a weight [n, K'] that SlideSparse slid, 8 bits.

    For every group of 2N values it has the windows 0 to N-2 in turn, of four values each, of which
    window j starts at the group's value 2j. Every nonzero is in one window only.
    """
    groups, n = pattern.groups(k), pattern.n
    slid = groups * (n - 1) * 4
    expected = -(-slid // SLID_MULTIPLE) * SLID_MULTIPLE
    if weight.shape[1] != expected or weight.dtype.itemsize != 1:
        raise ValueError(
            f"a weight that SlideSparse slid for {pattern} has 8 bits and K={expected}, this one "
            f"is {weight.dtype} with K={weight.shape[1]}"
        )
    windows = weight.view(torch.uint8)[:, :slid].reshape(-1, groups, n - 1, 4)
    first, second = pad(windows[..., :2], (0, 0, 0, 1)), pad(windows[..., 2:], (0, 0, 1, 0))
    if (first.bool() & second.bool()).any():
        raise ValueError(f"windows of {pattern} hold one value twice")
    return (first | second).flatten(1)[:, :k].view(weight.dtype)
