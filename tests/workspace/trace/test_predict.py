# SPDX-License-Identifier: Apache-2.0
"""What a kernel will bring: from a trace and a record of kernels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from workspace.bench.record import ModelRecord, Provenance
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT
from workspace.trace import predict
from workspace.trace.record import PhaseRecord, Record, Row, SideRecord
from workspace.verbs import Predict

KERNELS = ROOT / "benchmarks/kernels/gemm-h200.json"
BENCH = ROOT / "benchmarks/engine/qwen2.5-7b-latency-h200.json"
PRODUCTS = {"self_attn.qkv_proj": 300.0, "mlp.gate_up_proj": 2000.0, "lm_head": 200.0}


def phase(name: str, tokens: float, gaps: float, **changes: Any) -> PhaseRecord:
    parts = {**PRODUCTS, "attention": 500.0}
    rows = [Row(part=part, kernel="k", calls=28, us=us) for part, us in parts.items()]
    busy = sum(parts.values())
    values: dict[str, Any] = {
        "phase": name, "steps": 4, "requests": 8, "tokens": tokens, "us": busy + gaps,
        "fastest_us": busy, "slowest_us": busy, "busy_us": busy, "attributed": 1, "rows": rows,
    }  # fmt: skip
    return PhaseRecord(**values | changes)


def written(folder: Path, *phases: PhaseRecord, **changes: Any) -> Path:
    """A trace of the 7B."""
    side = SideRecord(
        name="stock", arguments=[], environment={}, traces=[], launches={}, untraced_s=1,
        traced_s=1, phases=list(phases),
    )  # fmt: skip
    provenance = Provenance(
        workspace=None, fork=None, locks={}, kernels="", environment={}, cpu="", cpu_flags=[],
        cores=2, system="", load_before=0,
    )  # fmt: skip
    model = ModelRecord(
        name="Qwen/Qwen2.5-7B", weights="dummy", seed=1, source="", dtype="bfloat16", parameters=1
    )
    values: dict[str, Any] = {
        "run": "r", "started": "", "duration_s": 1, "valid": True, "failures": [], "command": "",
        "model": model, "device": "1 x NVIDIA H200", "device_kind": "cuda", "tensor_parallel": 1,
        "eager": False, "bytes_per_second": 4e12, "flops_per_second": {}, "sides": [side],
        "provenance": provenance,
    }  # fmt: skip
    path = folder / "trace.json"
    path.write_text(Record(**values | changes).model_dump_json())
    return path


def test_a_step_loses_what_each_part_gains_at_its_number_of_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, phase("decode", 8, gaps=0))
    trace = predict._trace(path)
    measured = predict.kernels.read(KERNELS)
    one = predict.Prediction(
        trace.sides[0].phases[0],
        list(predict.changes(trace, trace.sides[0].phases[0], measured, "cublaslt")),
    )
    assert {change.part for change in one.changes} == set(PRODUCTS)
    assert {change.m for change in one.changes} == {8}
    for change in one.changes:
        (row,) = [
            row
            for row in measured.rows
            if (row.labels["model"], row.labels["M"]) == ("qwen2.5-7b", 8)
            and predict.computes("gemm", str(row.labels["layer"]), change.part)
        ]
        timed = row.timed("cublaslt")
        assert timed is not None
        assert change.ratio == timed.ratio
    saved = sum(change.us * (1 - 1 / change.ratio) for change in one.changes)
    least, most = one.us
    assert least <= 3000 - saved <= most
    predict.run(Predict(str(path), str(KERNELS), backend="cublaslt"))
    printed = capsys.readouterr().out
    assert "gemm.cublaslt, decode: µs of a step" in printed
    assert f"{one.ratio[0]:.3f} to {one.ratio[1]:.3f}" in printed


@pytest.mark.parametrize(
    ("operation", "layer", "part", "does"),
    [
        ("gemm", "qkv", "self_attn.qkv_proj", True),
        ("gemm", "o", "self_attn.o_proj", True),
        ("gemm", "o", "between self_attn.qkv_proj and self_attn.o_proj", False),
        ("gemm", "lm_head", "lm_head", True),
        ("gemm", "q_proj+k_proj", "self_attn.k_proj", True),  # captured
        ("gemm", "down", "mlp.gate_up_proj", False),
        ("rms_norm", "input_layernorm+norm", "norm", True),
        ("rms_norm", "norm", "mlp.down_proj", False),
        ("rotary_embedding", "rotary", "between self_attn.qkv_proj and self_attn.o_proj", True),
    ],
)
def test_a_case_is_found_in_the_parts_that_its_operation_computes(
    operation: str, layer: str, part: str, *, does: bool
) -> None:
    assert predict.computes(operation, layer, part) is does


def test_where_the_device_waits_the_gain_may_become_more_waiting(tmp_path: Path) -> None:
    trace = predict._trace(written(tmp_path, phase("decode", 8, gaps=0), phase("decode", 8, 1500)))
    measured = predict.kernels.read(KERNELS)
    busy, waiting = (
        predict.Prediction(one, list(predict.changes(trace, one, measured, "cublaslt")))
        for one in trace.sides[0].phases
    )
    assert busy.us[1] < busy.phase.us
    assert waiting.us[1] == waiting.phase.us
    assert waiting.us[0] == pytest.approx(busy.us[0] + 1500)


def test_predicted_and_measured_stand_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, phase("prefill", 1024, gaps=0, steps=1), phase("decode", 8, gaps=0))
    predict.run(Predict(str(path), str(KERNELS), bench=str(BENCH)))
    printed = capsys.readouterr().out
    assert "measured in the engine: 0.962 [0.940, 0.984], gemm.cublaslt" in printed
    assert "predicted with cublaslt: 0." in printed
    assert "predicted with skinny: " not in printed  # which that engine did not run
    # 1024 tokens are not in the record, but the output head has 8 in this phase as well.
    (prefill,) = [line for line in printed.splitlines() if "cublaslt" in line and "prefill" in line]
    assert "6.7%" in prefill


def test_what_cannot_be_predicted_says_why(tmp_path: Path) -> None:
    far = written(tmp_path, phase("decode", 64, gaps=0, requests=64))
    with pytest.raises(WorkspaceError, match=r"has no case that is a part of .*, M=64$"):
        predict.run(Predict(str(far), str(KERNELS)))
    with pytest.raises(WorkspaceError, match="latency of 8 requests, the trace has 64"):
        predict.run(Predict(str(far), str(KERNELS), bench=str(BENCH)))
    near = shutil.move(written(tmp_path, phase("decode", 8, gaps=0)), tmp_path / "near.json")
    with pytest.raises(WorkspaceError, match=r"BACKEND=mine is not in .*; use cublaslt, skinny"):
        predict.run(Predict(str(near), str(KERNELS), backend="mine"))
    invalid = written(tmp_path, phase("decode", 8, gaps=0), valid=False, failures=["so"])
    with pytest.raises(WorkspaceError, match="the trace is not valid; trace again"):
        predict.run(Predict(str(invalid), str(KERNELS)))
    with pytest.raises(WorkspaceError, match="is not a record of make trace"):
        predict.run(Predict(str(KERNELS), str(KERNELS)))
    with pytest.raises(WorkspaceError, match="is not a record of make bench: "):
        predict.run(Predict(str(near), str(KERNELS), bench=str(KERNELS)))
    with pytest.raises(WorkspaceError, match="name a trace and a record of kernels"):
        predict.run(Predict())
