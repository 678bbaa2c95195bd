# SPDX-License-Identifier: Apache-2.0
"""What config.json says of a sparse checkpoint, to this workspace and to compressed-tensors."""

from __future__ import annotations

import pytest
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

from workspace.bench.checkpoint import dense_config
from workspace.convert.description import Dtype, quantization_config


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_without_what_is_ours_compressed_tensors_reads_it_as_dense_w8a8(dtype: Dtype) -> None:
    ours = quantization_config("2:4", dtype, ["lm_head"], {"model": "m"})
    assert (ours["quant_method"], ours["pattern"]) == ("sparse", "2:4")
    dense = dense_config(ours)
    assert set(ours) - set(dense) == {"pattern", "source"}
    read = QuantizationConfig.model_validate(dense)
    assert read.model_dump()["quant_method"] == "compressed-tensors"
    (group,) = read.config_groups.values()
    assert isinstance(group, QuantizationScheme)
    weights, activations = group.weights, group.input_activations
    assert weights
    assert activations
    kind = {"fp8": "float", "int8": "int"}[dtype]
    assert (weights.num_bits, weights.type, weights.strategy) == (8, kind, "channel")
    assert (activations.num_bits, activations.type, activations.strategy) == (8, kind, "token")
    assert (weights.dynamic, activations.dynamic) == (False, True)
