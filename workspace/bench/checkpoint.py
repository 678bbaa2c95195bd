# SPDX-License-Identifier: Apache-2.0
"""What a model's folder says of 8-bit and of sparse weights: precision, pattern, and how vLLM's own
method loads the same tensors as dense ones. The engine reads it for itself, in
`custom_kernels.vllm.quantization`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

Precision = Literal["fp8", "int8"]

METHOD, DENSE_METHOD = "sparse", "compressed-tensors"
"""The quantization method of a converted model, and vLLM's own for the same tensors."""
SPARSE_ONLY = ("pattern", "source", "sparsity_config")
"""Entries of a quantization_config that the dense method does not know, or refuses."""
PRECISIONS: dict[tuple[str, int], Precision] = {("float", 8): "fp8", ("int", 8): "int8"}
"""By type and bits of the numbers in a quantization_config."""
SLIDESPARSE = "slidesparse_config.json"
"""What SlideSparse's converter writes beside config.json."""


@dataclass(frozen=True)
class Quantized:
    """Weights in 8 bits, sparse weights, or both.

    `precision` is None if they are not in 8 bits, `pattern` if they are dense. `dense` is the
    quantization_config with which vLLM's own method reads the same tensors as dense 8-bit ones;
    None if it does not. `source` is the model that was converted, as it was called then.
    """

    precision: Precision | None
    pattern: str | None
    dense: Mapping[str, Any] | None
    source: str | None = None

    @property
    def label(self) -> str:
        """ "2:4 int8", or what there is of it."""
        return " ".join(part for part in (self.pattern, self.precision) if part)


class _Numbers(BaseModel):
    type: str
    num_bits: int


class _Group(BaseModel):
    weights: _Numbers


class _Sparsity(BaseModel):
    format: str = "dense"
    sparsity_structure: str | None = None


class _Source(BaseModel):
    model: str | None = None


class _SlideSparse(BaseModel):
    Z: int
    L: int


class _Entry(BaseModel):
    quant_method: Literal["sparse", "compressed-tensors"]
    pattern: str | None = None
    config_groups: dict[str, _Group] = {}
    sparsity_config: _Sparsity | None = None
    source: _Source | None = None


def dense_config(quantization_config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization_config by which vLLM loads the tensors of a converted model as dense ones,
    quantized per output channel and, while it runs, per token."""
    kept = {name: value for name, value in quantization_config.items() if name not in SPARSE_ONLY}
    return kept | {"quant_method": DENSE_METHOD}


def read(config: Mapping[str, Any], folder: Path | None = None) -> Quantized | None:
    """What a configuration says, and SlideSparse's file in its folder; None if the weights are
    neither sparse nor in 8 bits, or of another method."""
    try:
        entry = _Entry.model_validate(config.get("quantization_config"))
        slides = _slidesparse(folder) if folder else None
    except ValidationError:
        return None
    numbers = {(one.weights.type, one.weights.num_bits) for one in entry.config_groups.values()}
    precision = PRECISIONS.get(numbers.pop()) if len(numbers) == 1 else None
    sparsity = entry.sparsity_config or _Sparsity()
    pattern = "2:4" if sparsity.sparsity_structure == "2:4" else entry.pattern
    if slides:
        pattern = f"{slides.L - slides.Z}:{slides.L}"
    if not pattern and not precision:
        return None
    plain = precision and sparsity.format == "dense" and not slides
    dense = dense_config(config["quantization_config"]) if plain else None
    return Quantized(precision, pattern, dense, entry.source.model if entry.source else None)


def _slidesparse(folder: Path) -> _SlideSparse | None:
    file = folder / SLIDESPARSE
    return _SlideSparse.model_validate_json(file.read_bytes()) if file.is_file() else None


def is_sparse(model: str | None) -> bool:
    """Whether MODEL is a folder with sparse weights."""
    folder = Path(model or "").expanduser()
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    found = read(config, folder) if isinstance(config, dict) else None
    return found is not None and found.pattern is not None
