# SPDX-License-Identifier: Apache-2.0
"""What a config.json says of 8-bit weights: their precision, their sparsity pattern, and how vLLM's
own methods load the same tensors as dense ones."""

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


@dataclass(frozen=True)
class Quantized:
    """Weights in 8 bits.

    `pattern` is None for a dense checkpoint. `dense` is the quantization_config with which vLLM's
    own method reads the same tensors; None if only a sparse method reads them. `source` is the
    model that was converted, as it was called then.
    """

    precision: Precision
    pattern: str | None
    dense: Mapping[str, Any] | None
    source: str | None = None

    @property
    def label(self) -> str:
        """ "2:4 int8", or "int8" of a dense checkpoint."""
        return f"{self.pattern} {self.precision}" if self.pattern else self.precision


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


class _Entry(BaseModel):
    quant_method: str
    pattern: str | None = None
    config_groups: dict[str, _Group]
    sparsity_config: _Sparsity | None = None
    source: _Source | None = None


def dense_config(quantization_config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization_config by which vLLM loads the tensors of a converted model as dense ones,
    quantized per output channel and, while it runs, per token."""
    kept = {name: value for name, value in quantization_config.items() if name not in SPARSE_ONLY}
    return kept | {"quant_method": DENSE_METHOD}


def read(config: Mapping[str, Any]) -> Quantized | None:
    """What a configuration says; None if its weights are not in 8 bits, or of another method."""
    try:
        entry = _Entry.model_validate(config.get("quantization_config"))
    except ValidationError:
        return None
    numbers = {(one.weights.type, one.weights.num_bits) for one in entry.config_groups.values()}
    precisions = {PRECISIONS.get(one) for one in numbers}
    if entry.quant_method not in (METHOD, DENSE_METHOD) or len(precisions) != 1:
        return None
    (precision,) = precisions
    if precision is None:
        return None
    sparsity = entry.sparsity_config or _Sparsity()
    return Quantized(
        precision,
        "2:4" if sparsity.sparsity_structure == "2:4" else entry.pattern,
        dense_config(config["quantization_config"]) if sparsity.format == "dense" else None,
        entry.source.model if entry.source else None,
    )


def is_sparse(model: str | None) -> bool:
    """Whether MODEL is a folder with sparse weights in 8 bits, by its config.json alone."""
    try:
        config = json.loads((Path(model or "").expanduser() / "config.json").read_text())
    except (OSError, ValueError):
        return False
    found = read(config) if isinstance(config, dict) else None
    return found is not None and found.pattern is not None
