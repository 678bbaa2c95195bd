# SPDX-License-Identifier: Apache-2.0
"""The `quantization_config` in config.json of a sparse checkpoint.

The tensors are those of compressed-tensors' W8A8: `<layer>.weight` [N, K] in 8 bits with its
zeros, `<layer>.weight_scale` [N, 1] float32, dequantized = weight · weight_scale; activations are
quantized per token while they come. Only this description says that the zeros have a pattern.
"""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue

Dtype = Literal["fp8", "int8"]
JsonObject = dict[str, JsonValue]

SPARSE = "sparse"
"""The quantization method of this workspace that reads it."""
_TYPES = {"fp8": "float", "int8": "int"}


def quantization_config(
    pattern: str, dtype: Dtype, ignore: list[str], source: JsonObject
) -> JsonObject:
    """What config.json says of a sparse checkpoint.

    Args:
        pattern: such as "2:4".
        dtype: of the quantized weights.
        ignore: linear layers that are not quantized.
        source: where the weights came from: model, scores, workspace.
    """
    kind: JsonObject = {"num_bits": 8, "type": _TYPES[dtype], "symmetric": True}
    weights: JsonObject = {**kind, "strategy": "channel", "dynamic": False}
    activations: JsonObject = {**kind, "strategy": "token", "dynamic": True}
    group: JsonObject = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": SPARSE,
        "pattern": pattern,
        "format": f"{_TYPES[dtype]}-quantized",
        "config_groups": {"group_0": group},
        "ignore": [*ignore],
        "quantization_status": "compressed",
        "source": source,
    }
