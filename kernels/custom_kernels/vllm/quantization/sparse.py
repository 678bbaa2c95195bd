# SPDX-License-Identifier: Apache-2.0
"""``sparse``: a checkpoint whose 8-bit weights have the zeros of a pattern, as its own files say.

Chosen by vLLM without ``--quantization`` where config.json, or the file beside it that SlideSparse
writes, says that the weights are sparse. What is read: ``_checkpoint.py``.
"""

from pathlib import Path
from typing import Any

from custom_kernels.vllm import upstream
from custom_kernels.vllm.quantization import _base
from custom_kernels.vllm.quantization._sparse import QUANTIZED, SparseLinear

SLIDESPARSE = "slidesparse_config.json"


class Config(_base.Config):
    linear_method = SparseLinear

    def __init__(self) -> None:
        # vLLM comes here where config.json holds no quantization_config.
        raise ValueError(
            "--quantization sparse loads checkpoints that are sparse and quantized, and this one "
            "has no quantization_config; use sparse_2_4, sparse_4_6, sparse_6_8 or sparse_mixed "
            "to prune and quantize it while it is loaded, or make convert"
        )

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        name, method = cls.get_name(), hf_quant_cfg["quant_method"]
        if user_quant == name:
            return name if method in QUANTIZED else None
        if user_quant is not None:
            return None
        # vLLM 0.13.0 does not say here which model it is.
        folder = getattr(hf_config, "_name_or_path", "")
        compressed = method == "compressed-tensors" and (
            hf_quant_cfg.get("sparsity_config")
            or is_marlin_24(hf_quant_cfg)
            or (folder and Path(folder, SLIDESPARSE).is_file())
        )
        return name if method == name or compressed else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> upstream.QuantizationConfig:
        from custom_kernels.vllm.quantization import _checkpoint

        return _checkpoint.read(cls.get_name(), config)


def is_marlin_24(config: dict[str, Any]) -> bool:
    """Whether weights are in Marlin's layout for 4-bit 2:4 weights."""
    groups = config.get("config_groups") or {}
    formats = [config, *groups.values()]
    return any(one.get("format") == "marlin-24" for one in formats)
