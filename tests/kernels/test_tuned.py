# SPDX-License-Identifier: Apache-2.0
"""Tuning files: made from a benchmark's record, found at run time, ignored when they are not what
they should be."""

from __future__ import annotations

import json
import logging
import timeit
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from custom_kernels import paths, registry, tuned
from custom_kernels.bench.record import Ceilings, ClockState, Provenance, Record, Row, Timed
from custom_kernels.tuning import __main__ as command
from custom_kernels.tuning import adopt

GPU = "Imaginary GPU"
QKV = {"N": 1152, "K": 896, "bias": True}
OUTPUT = {"N": 896, "K": 896, "bias": False}


def timed(us: float, torch_us: float | None = 10.0) -> Timed:
    """As in a record: the ratio is to torch, and its interval one per cent to either side."""
    times = {"us": us, "p20": us, "p80": us, "error": 0.0, "blocks": 9}
    rates = {"tflops": 1.0, "gbytes_per_second": 1.0}
    if torch_us is None:
        return Timed(**times, **rates)
    ratio = torch_us / us
    return Timed(**times, **rates, ratio=ratio, low=0.99 * ratio, high=1.01 * ratio)


def row(layer: str, m: int, **us: float) -> Row:
    return Row(
        labels={"model": "qwen2.5-0.5b", "layer": layer, "M": m},
        flops=1,
        bytes=1,
        peak="bfloat16",
        input_sets=2,
        rounds=1,
        cold=True,
        clocks=ClockState(),
        contenders={"torch": timed(10.0, None), **{name: timed(t) for name, t in us.items()}},
    )


def with_rows(record: Record, *rows: Row, **provenance: str) -> Record:
    changed = record.provenance.model_copy(update=provenance)
    return record.model_copy(update={"rows": list(rows), "provenance": changed})


@pytest.fixture
def record() -> Record:
    return Record(
        operation="gemm",
        dtype="bfloat16",
        baseline="torch",
        backends=["cublaslt", "skinny", "triton"],
        baselines=["torch"],
        skipped={},
        ceilings=Ceilings(bytes_per_second=1, flops_per_second={}),
        summary={},
        failures=[],
        warnings=[],
        provenance=Provenance(time="now", command="none", device=GPU, torch="2.11.0", python="3"),
        rows=[
            row("qkv", 1, cublaslt=9, skinny=7, triton=8),
            row("qkv", 4, cublaslt=9, skinny=7, triton=8),
            row("qkv", 16, cublaslt=9, skinny=8.8, triton=9.5),
            row("qkv", 64, cublaslt=9, skinny=30, triton=8),
            row("o", 8, cublaslt=9, skinny=9, triton=9),
        ],
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("CUSTOM_KERNELS_CACHE", str(tmp_path))
    tuned.forget()
    yield tmp_path
    tuned.forget()


def test_what_was_adopted_is_found_and_nothing_is_extrapolated(record: Record) -> None:
    lines = adopt.adopt(record)
    assert lines[1:] == [
        "bfloat16 N=1152 K=896 bias=True: M 1-4: skinny, M 16: cublaslt, M 64: triton",
        "bfloat16 N=896 K=896 bias=False: M 8: cublaslt",
    ]
    found = {m: tuned.measured("gemm", GPU, "bfloat16", m, QKV) for m in (1, 3, 4, 9, 16, 64, 65)}
    assert found == {
        1: "skinny",
        3: "skinny",
        4: "skinny",
        9: None,
        16: "cublaslt",
        64: "triton",
        65: None,
    }
    assert tuned.measured("gemm", GPU, "float16", 1, QKV) is None
    assert tuned.measured("gemm", GPU, "bfloat16", 1, {**QKV, "bias": False}) is None
    assert tuned.measured("gemm", "Another GPU", "bfloat16", 1, QKV) is None


def test_a_lead_that_may_be_noise_is_not_taken() -> None:
    incumbent = timed(9.0)
    assert adopt.surely_faster(timed(8.6), incumbent)
    assert not adopt.surely_faster(timed(8.8), incumbent)
    assert not adopt.surely_faster(timed(9.5), incumbent)
    assert not adopt.surely_faster(timed(1.0, None), incumbent)


def test_a_file_names_where_it_was_measured_and_keeps_other_layers(record: Record) -> None:
    adopt.adopt(record)
    adopt.adopt(with_rows(record, row("o", 8, cublaslt=9, skinny=5), torch="2.12.0"))
    file = json.loads(tuned.files("gemm", GPU)[0].read_text())
    assert [entry["torch"] for entry in file["provenance"]] == ["2.11.0", "2.12.0"]
    assert [entry["provenance"] for entry in file["choices"]] == [0, 1]
    assert "python" not in file["provenance"][0]
    assert tuned.measured("gemm", GPU, "bfloat16", 8, OUTPUT) == "skinny"
    assert tuned.measured("gemm", GPU, "bfloat16", 1, QKV) == "skinny"


def test_the_users_file_goes_first(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = tmp_path / "theirs.json", tmp_path / "ours.json"
    monkeypatch.setattr(tuned, "files", lambda *_: [theirs, ours])
    adopt.adopt(record, ours)
    assert tuned.measured("gemm", GPU, "bfloat16", 1, QKV) == "skinny"
    adopt.adopt(with_rows(record, row("qkv", 1, cublaslt=9, skinny=9)), theirs)
    assert tuned.measured("gemm", GPU, "bfloat16", 1, QKV) == "cublaslt"
    assert tuned.measured("gemm", GPU, "bfloat16", 8, OUTPUT) == "cublaslt"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "it is not JSON"),
        ("[]", "it is not of schema 1"),
        ('{"schema": 9}', "it is not of schema 1"),
        ('{"schema": 1, "operation": "gemm", "gpu": "Other"}', "it is for gemm on Other"),
        (
            f'{{"schema": 1, "operation": "gemm", "gpu": "{GPU}", "choices": [{{}}], '
            '"settings": {}}',
            "an entry is damaged",
        ),
    ],
)
def test_a_file_that_is_none_is_ignored_with_one_warning(
    caplog: pytest.LogCaptureFixture, text: str, reason: str
) -> None:
    path = tuned.files("gemm", GPU)[0]
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        for m in (1, 2, 3):
            assert tuned.measured("gemm", GPU, "bfloat16", m, QKV) is None
    (warning,) = caplog.records
    assert reason in warning.getMessage()
    assert str(path) in warning.getMessage()
    with pytest.raises(tuned.TuningError):
        tuned.read(path, "gemm", GPU)


def test_a_record_without_the_preferred_backend_teaches_nothing(
    record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(tuned.TuningError, match="no row of the record has a time of cublaslt"):
        adopt.adopt(with_rows(record, row("qkv", 1, skinny=7)))
    path = tmp_path / "record.json"
    path.write_text("{}")
    assert command.main([str(path)]) == 1
    assert "error: " in capsys.readouterr().err


def test_on_a_cpu_the_order_of_preference_decides() -> None:
    device = torch.device("cpu")
    assert tuned.backend("gemm", device, torch.float32, 1, **QKV) == "reference"
    assert tuned.settings("gemm", "triton", device, torch.bfloat16, 1, N=1, K=1) is None


def test_a_look_up_costs_no_more_than_the_smallest_operator_of_torch() -> None:
    device, dtype, x = torch.device("cpu"), torch.float32, torch.ones(1)

    def look_up() -> str:
        return tuned.backend("gemm", device, dtype, 4, N=896, K=896, bias=True)

    look_up()
    # In turns, so that another load on the machine meets both.
    pairs = [(timeit.timeit(look_up, number=500), timeit.timeit(lambda: x + x, number=500))
             for _ in range(40)]  # fmt: skip
    assert min(ours for ours, _ in pairs) < min(torchs for _, torchs in pairs)


def test_the_files_of_the_package_are_whole_and_name_backends_that_exist() -> None:
    for path in paths.PACKAGE.glob("*/tuning/*.json"):
        operation = path.parents[1].name
        gpu = json.loads(path.read_text())["gpu"]
        assert tuned.files(operation, gpu)[1] == path
        file = tuned.read(path, operation, gpu)
        for entry in file["choices"]:
            assert {name for _, _, name in entry["ranges"]} <= set(
                registry.operation(operation).backend_names()
            )
            assert file["provenance"][entry["provenance"]]["device"] == gpu
