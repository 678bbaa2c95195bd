# SPDX-License-Identifier: Apache-2.0
"""What config.json says of a checkpoint with quantized or sparse weights, and the layers by it.

Three kinds are told apart, all of them with compressed-tensors' keys:

- ``make convert`` writes ``"quant_method": "sparse"`` and ``"pattern"``; every quantized layer is
  sparse.
- compressed-tensors says with ``sparsity_config`` which layers are 2:4 and how they are compressed;
  they may be quantized besides. vLLM 0.25.1 refuses the entry. Where it names another structure, it
  says nothing about how the weights are stored: vLLM's own method loads them without it.
- SlideSparse leaves config.json as it was and writes ``slidesparse_config.json`` beside it.

Which layers are quantized, and everything that is not a sparse linear layer (attention's scales,
dense layers), is vLLM's own compressed-tensors method's.
"""

import json
import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from custom_kernels.vllm import upstream, upstream_compressed
from custom_kernels.vllm.quantization._sparse import SparseLinear
from custom_kernels.vllm.quantization._stored import Storage, StoredLinear
from custom_kernels.vllm.quantization.sparse import SLIDESPARSE, is_marlin_24

log = logging.getLogger(__name__)

DTYPES = {"float": torch.float8_e4m3fn, "int": torch.int8}
"""Quantized weights by compressed-tensors' ``type``."""


class Checkpoint(upstream_compressed.CompressedTensorsConfig):
    """vLLM's configuration of a compressed-tensors checkpoint, with sparse linear layers."""

    name: str
    pattern: str
    """Empty until ``maybe_update_config`` where only SlideSparse's file has it."""
    sparse_targets: list[str] | None
    """Which layers are sparse; None: the quantized ones."""
    sparse_ignore: list[str]
    bitmask: bool
    slides: bool = False
    told: bool = False

    def get_name(self) -> str:
        return self.name

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self.sparse_ignore = hf_to_vllm_mapper.apply_list(self.sparse_ignore)

    def maybe_update_config(self, model_name: str, *others: Any, **more: Any) -> None:
        """vLLM calls this with the model's folder before it makes the first layer."""
        path = Path(model_name, SLIDESPARSE)
        if path.is_file():
            described = json.loads(path.read_text())
            zeros, group, extra = described["Z"], described["L"], described.get("extra", {})
            if not extra.get("skip_compress", True):
                raise ValueError(
                    f"{self.name}: {path.name} says that the weights are compressed by cuSPARSELt, "
                    "in a layout of its own; convert the model again without --compress"
                )
            self.pattern = agreed(self.name, self.pattern, f"{group - zeros}:{group}")
            self.slides = not extra.get("skip_slide", False)
        if not self.pattern:
            raise ValueError(
                f"{self.name}: config.json does not say which pattern the weights have; name it, "
                "for example with --quantization sparse_2_4"
            )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        fused = self.packed_modules_mapping
        if upstream_compressed.is_experts(layer):
            names = (prefix, f"{prefix}.0.gate_proj")
            if any(upstream_compressed.is_ignored(one, self.ignore, fused) for one in names):
                return super().get_quant_method(layer, prefix)
            raise ValueError(
                f"{self.name}: {prefix} has experts, for which there is no sparse kernel; list "
                'them in config.json under "ignore" if they are not quantized'
            )
        if not isinstance(layer, upstream.LinearBase):
            return super().get_quant_method(layer, prefix)
        scheme = self.get_scheme_dict(layer, prefix)
        if self.sparse_targets is None:
            sparse = scheme is not None
        else:
            sparse = upstream_compressed.matches(
                layer, prefix, self.sparse_targets, fused
            ) and not upstream_compressed.is_ignored(prefix, self.sparse_ignore, fused)
        if not sparse:
            return super().get_quant_method(layer, prefix)
        storage = self._storage(prefix, scheme)
        if upstream.draws_weights():
            return SparseLinear(self, storage.dtype)
        parts = fused.get(prefix.rpartition(".")[2], [])
        return StoredLinear(self, storage, parts)

    def _storage(self, prefix: str, scheme: dict[str, Any] | None) -> Storage:
        """How a sparse layer is stored, by its compressed-tensors scheme; without one it is not
        quantized. Raises ValueError for what no kernel computes."""
        if scheme is None:
            return Storage(None, bitmask=self.bitmask)
        weights, inputs = scheme["weights"], scheme["input_activations"]
        wrong = None
        if weights.num_bits != 8 or weights.strategy not in ("channel", "tensor"):
            wrong = f"has weights of {weights.num_bits} bits by {weights.strategy}"
        elif inputs is None or inputs.num_bits != 8 or inputs.type != weights.type:
            wrong = "has weights and activations of different types"
        elif not (weights.symmetric and inputs.symmetric):
            wrong = "is quantized asymmetrically"
        elif scheme.get("output_activations") is not None:
            wrong = "has quantized outputs"
        if wrong:
            raise ValueError(
                f"{self.name}: {prefix} {wrong}; a sparse layer has 8-bit weights by channel or "
                "tensor and activations of the same type, all symmetric: quantize it like that, or "
                'list it in config.json under "ignore" and store it unquantized'
            )
        if not self.told and (not inputs.dynamic or inputs.strategy != "token"):
            log.warning(
                "%s: activations are quantized per token while the model runs, and not per tensor "
                "with the checkpoint's scales, which are not used",
                self.name,
            )
            self.told = True
        return Storage(
            DTYPES[weights.type],
            per_tensor=weights.strategy == "tensor",
            static=not inputs.dynamic,
            bitmask=self.bitmask,
            slides=self.slides,
        )


def read(name: str, config: dict[str, Any], pattern: str = "") -> upstream.QuantizationConfig:
    """The configuration for config.json's ``quantization_config``.

    Args:
        name: the method that reads it.
        config: left unchanged.
        pattern: that the user asks for, or none.

    Returns:
        A ``Checkpoint``; vLLM's own where the weights are said not to be 2:4.

    Raises:
        ValueError: the weights are stored in a way that is not read here, or have another pattern.
    """
    config = deepcopy(config)
    if is_marlin_24(config):
        if upstream_compressed.RUNS_MARLIN_24 and not pattern:
            return upstream_compressed.CompressedTensorsConfig.from_config(config)
        raise ValueError(
            f"{name}: the weights have format marlin-24, 4 bits in the layout of a kernel that "
            "this vLLM does not have; convert the model that they were made from with make convert"
        )
    sparsity = config.pop("sparsity_config", None) or {}
    storage = sparsity.get("format", "dense")
    structure = str(sparsity.get("sparsity_structure")).lower()
    if storage not in ("dense", "sparse-24-bitmask"):
        raise ValueError(
            f"{name}: the weights are compressed in the format {storage}, of which only dense and "
            "sparse-24-bitmask are read; decompress them with the compressed-tensors that wrote "
            "them"
        )
    if sparsity:
        log.warning(
            "%s: config.json has a sparsity_config (%s, %s), with which vLLM 0.25.1 alone refuses "
            "the model; it is loaded %s",
            name,
            structure,
            storage,
            "as 2:4" if structure == "2:4" or pattern else "as dense, without this entry",
        )
        if structure != "2:4" and not pattern:
            return upstream_compressed.CompressedTensorsConfig.from_config(config)
    if config.get("transform_config"):
        raise ValueError(
            f"{name}: config.json has a transform_config, which sparse layers do not apply; use a "
            "model that was quantized without transforms"
        )
    declared = config.pop("pattern", "") or ("2:4" if structure == "2:4" else "")
    checkpoint = Checkpoint.from_config(config)
    checkpoint.name, checkpoint.pattern = name, agreed(name, pattern, declared)
    listed = structure == "2:4" or not config.get("config_groups")
    checkpoint.sparse_targets = (sparsity.get("targets") or ["Linear"]) if listed else None
    checkpoint.sparse_ignore = sparsity.get("ignore") or []
    checkpoint.bitmask = storage == "sparse-24-bitmask"
    return checkpoint


def agreed(name: str, asked: str, declared: str) -> str:
    """The pattern that both say; either may say none."""
    if asked and declared and asked != declared:
        raise ValueError(
            f"{name}: the checkpoint says that its weights are {declared}, not {asked}; load it "
            "with --quantization sparse, or without the option"
        )
    return asked or declared
