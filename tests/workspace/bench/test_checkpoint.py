# SPDX-License-Identifier: Apache-2.0
"""What is read of a config.json whose weights are in 8 bits."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.workspace.bench.samples import quantization_config
from workspace.bench import checkpoint
from workspace.bench.checkpoint import Quantized

SPARSITY = {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"]}
EIGHT: dict[str, Any] = {"type": "int", "num_bits": 8}
FOUR_BITS = EIGHT | {"num_bits": 4}
THEIRS: dict[str, Any] = {"quant_method": "compressed-tensors", "pattern": None, "source": None}


def read(**changes: Any) -> Quantized | None:
    return checkpoint.read({"quantization_config": quantization_config(**changes)})


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_converted_model_names_pattern_precision_and_source(precision: str) -> None:
    found = read(precision=precision, pattern="6:8")
    assert found is not None
    assert found.label == f"6:8 {precision}"
    assert found.source == "tiny-qwen2"


def test_the_dense_entry_has_nothing_of_sparsity() -> None:
    entry = quantization_config(sparsity_config=SPARSITY)
    dense = checkpoint.dense_config(entry)
    assert entry.keys() - dense.keys() == {"pattern", "source", "sparsity_config"}
    assert dense == {name: entry[name] for name in dense} | {"quant_method": "compressed-tensors"}


def test_a_pattern_may_be_that_of_a_sparsity_config() -> None:
    kept = read(**THEIRS, sparsity_config=SPARSITY)
    packed = read(**THEIRS, sparsity_config=SPARSITY | {"format": "sparse-24-bitmask"})
    assert kept is not None
    assert packed is not None
    assert kept.label == packed.label == "2:4 int8"
    assert kept.dense is not None
    assert packed.dense is None  # only a sparse method reads those tensors


def test_a_dense_checkpoint_has_no_pattern() -> None:
    found = read(**THEIRS)
    assert found is not None
    assert (found.pattern, found.label) == (None, "int8")


def test_slidesparse_writes_its_pattern_beside_the_configuration(tmp_path: Path) -> None:
    config = {"quantization_config": quantization_config(**THEIRS)}
    (tmp_path / checkpoint.SLIDESPARSE).write_text(json.dumps({"Z": 2, "L": 8, "extra": {}}))
    found = checkpoint.read(config, tmp_path)
    assert found is not None
    assert (found.label, found.dense) == ("6:8 int8", None)


def test_sparse_weights_need_not_be_in_8_bits() -> None:
    found = read(**THEIRS, config_groups={}, sparsity_config=SPARSITY)
    assert found is not None
    assert (found.label, found.precision, found.dense) == ("2:4", None, None)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"quant_method": "sparse"},
        {**quantization_config(), "pattern": 7},
        quantization_config(quant_method="gptq"),
        quantization_config(**THEIRS | {"config_groups": {}}),
        quantization_config(config_groups={"a": {"weights": None}}),
        quantization_config(**THEIRS | {"config_groups": {"a": {"weights": FOUR_BITS}}}),
        quantization_config(
            **THEIRS
            | {"config_groups": {n: {"weights": EIGHT | {"type": n}} for n in ("int", "float")}}
        ),
    ],
)
def test_what_is_neither_sparse_nor_in_8_bits_is_left_to_vllm(entry: object) -> None:
    assert checkpoint.read({"quantization_config": entry}) is None
    assert checkpoint.read({}) is None


def test_a_sparse_folder_is_known_by_its_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": None}))
    assert not checkpoint.is_sparse(str(tmp_path))
    entry = {"quantization_config": quantization_config()}
    (tmp_path / "config.json").write_text(json.dumps(entry))
    assert checkpoint.is_sparse(str(tmp_path))
    for text in ("", "[]", "{"):
        (tmp_path / "config.json").write_text(text)
        assert not checkpoint.is_sparse(str(tmp_path))
    assert not checkpoint.is_sparse(None)
    assert not checkpoint.is_sparse("Qwen/Qwen2.5-0.5B")
