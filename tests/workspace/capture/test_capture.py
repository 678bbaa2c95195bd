# SPDX-License-Identifier: Apache-2.0
"""`make capture`: the real engine, what its workers wrote, and the benchmark at those shapes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from custom_kernels import registry
from custom_kernels.bench import __main__ as kernel_bench
from custom_kernels.bench import plan as kernel_plan
from custom_kernels.bench.shapes import Layer, Worker
from custom_kernels.command import UsageError
from rich.console import Console

from tests.workspace.bench import samples
from workspace.bench.record import Round
from workspace.capture import run as capture
from workspace.capture.engine import Captured
from workspace.capture.record import Record
from workspace.host.errors import WorkspaceError
from workspace.host.options import read
from workspace.verbs import Capture, Watch
from workspace.watch import fork_server, loop
from workspace.watch.messages import Checked, Inspected
from workspace.watch.screen import LiveScreen, figures
from workspace.watch.verdict import judge

LAYERS = 2
"""Of the bundled model."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RECORDS", "RUNS", "LOGS"):
        monkeypatch.setattr(capture, name, tmp_path / name.lower())
    monkeypatch.setattr(capture, "LOCK", tmp_path / "lock")
    return tmp_path


def worker(rank: int = 0, **changes: object) -> Worker:
    """A worker with one step of 20 tokens for 4 requests, and 7 in which each decodes one."""
    heads = {"heads": 4, "kv_heads": 2, "head_size": 32}
    layers = [
        ("gemm", "tokens", {"N": 256, "K": 128, "bias": True}, None, "self_attn.qkv_proj"),
        ("quantized_gemm", "tokens", {"N": 128, "K": 128, "bias": False}, "Fp8", "mlp.down_proj"),
        ("rms_norm", "tokens", {"K": 128, "residual": True}, None, "input_layernorm"),
        ("paged_attention", "decodes", heads | {"page": 16}, None, "self_attn.attn"),
    ]
    described = [
        {"operation": operation, "rows": rows, "shape": shape, "method": method,
         "names": [f"model.layers.{index}.{name}" for index in range(LAYERS)]}
        for operation, rows, shape, method, name in layers
    ]  # fmt: skip
    head = {"N": 512, "K": 128, "bias": False}
    described.append(
        {"operation": "gemm", "rows": "outputs", "shape": head, "method": None,
         "names": ["lm_head"]}
    )  # fmt: skip
    values = {
        "schema_version": 1, "worker": f"{rank}-0", "rank": rank, "vllm": "1", "device": "cpu",
        "dtype": "bfloat16", "model": "toy", "started": "2026-11-27T10:00:00+00:00",
        "layers": described, "left_out": {"FusedMoE": ["model.layers.1.mlp.experts"]},
        "scheduled": 48, "tokens": {"20": 1, "4": 7}, "outputs": {"4": 8},
        "decodes": [[4, 8, 3], [4, 16, 4]],
    }  # fmt: skip
    return Worker.model_validate(values | changes)


def left(folder: Path, *workers: Worker) -> Path:
    """A folder as an engine leaves it."""
    folder.mkdir(exist_ok=True)
    for number, one in enumerate(workers):
        (folder / f"worker-{number}.json").write_text(one.model_dump_json())
    return folder


def planned(operation: str, path: Path, *more: str) -> tuple[kernel_plan.Plan, dict[str, int]]:
    """What the benchmark of an operation plans for a capture: case → calls, and its plan."""
    definition = registry.operation(operation).cases
    options = kernel_bench.parser().parse_args([operation, "--shapes", str(path), *more])
    plan = kernel_plan.plan_of(options, definition)
    cases, captured = kernel_plan.cases_of(plan, definition)
    assert captured is not None
    return plan, {f"{one.labels['layer']} {one.labels['M']}": one.calls or 0 for one in cases}


@pytest.mark.engine
@pytest.mark.slow
def test_the_engine_calls_each_layer_once_per_step(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = capture.run(Capture(input_len=16, output_len=8, num_prompts=4))
    (path,) = (here / "records").glob("*.json")
    assert Record.model_validate_json(path.read_text()) == made
    assert made.valid
    assert made.provenance is not None
    (one,) = made.workers
    # The prompts in one step, then each request's tokens but the last.
    assert one.tokens == {4 * 16: 1, 4: 7}
    assert one.outputs == {4: 8}
    assert one.scheduled == 4 * 16 + 4 * 7
    assert one.decodes == [(4, 24, 7)]  # lengths of 17 to 23 share a bucket
    assert one.left_out == {}
    shapes = {name: layer.shape for layer in one.layers for name in layer.names}
    heads = {"heads": 4, "kv_heads": 2, "head_size": 32}
    assert len(shapes) == 9 * LAYERS + 2
    assert shapes["model.layers.0.self_attn.qkv_proj"] == {"N": 256, "K": 128, "bias": True}
    assert shapes["model.layers.1.mlp.down_proj"] == {"N": 128, "K": 128, "bias": False}
    assert shapes["model.layers.0.mlp.act_fn"] == {"K": 128}
    assert shapes["model.layers.0.input_layernorm"] == {"K": 128, "residual": False}
    assert shapes["model.norm"] == {"K": 128, "residual": True}
    assert shapes["model.layers.1.self_attn.attn"].items() > heads.items()
    assert shapes["model.layers.1.self_attn.rotary_emb"] == heads | {"rotary": 32, "is_neox": True}
    _, calls = planned("gemm", path)
    assert calls["gate_up_proj 64"] == LAYERS
    assert calls["gate_up_proj 4"] == LAYERS * 7
    assert calls["lm_head 4"] == 8
    printed = capfd.readouterr().out
    assert f"make bench-kernels K=gemm SHAPES={path}" in printed
    assert "paged_attention" in printed
    assert not list((here / "runs").iterdir())


def test_what_the_workers_of_a_server_left_becomes_one_record(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = left(here / "shapes", worker(1), worker(0))
    made = capture.run(read(Capture, {"FROM": str(folder)}))
    assert [one.rank for one in made.workers] == [0, 1]
    assert made.provenance is None
    printed = capfd.readouterr().out
    assert "not described: FusedMoE: model.layers.*.mlp.experts" in printed
    assert "quantized_gemm" in printed
    assert f"make capture FROM={folder}" in printed


def test_a_folder_that_is_not_of_one_engine_is_refused(here: Path) -> None:
    with pytest.raises(WorkspaceError, match="no worker has captured anything"):
        capture.read(here)
    with pytest.raises(WorkspaceError, match="captures of several engines"):
        capture.read(left(here / "two", worker(0), worker(0)))
    (here / "worker-9.json").write_text("{}")
    with pytest.raises(WorkspaceError, match="is not what a worker of this version captures"):
        capture.read(here)
    with pytest.raises(WorkspaceError, match="reads what ran already; leave out TP"):
        Capture(source=str(here), tp=2)


def test_steps_that_were_not_counted_make_a_capture_invalid() -> None:
    done = Round(seed=2, elapsed_s=1, prompt_tokens=20, output_tokens=32, reported_tokens=52)
    plan = samples.plan(num_prompts=4)
    result = Captured.model_construct(rounds=[done])
    assert capture.check(plan, result, [worker()]) == []
    (missing,) = capture.check(plan, result, [worker(scheduled=47)])
    assert missing == "rank 0 captured 47 tokens of the 48 that ran"
    (absent,) = capture.check(samples.plan(num_prompts=4, tensor_parallel=2), result, [worker()])
    assert absent == "1 worker captured shapes, 2 expected"


def test_kernels_are_measured_at_the_shapes_of_a_capture_the_costliest_first(here: Path) -> None:
    capture.run(read(Capture, {"FROM": str(left(here / "shapes", worker(0), worker(1)))}))
    (path,) = (here / "records").glob("*.json")
    plan, calls = planned("gemm", path)
    assert plan.dtype == "bfloat16"
    assert calls == {"qkv_proj 4": 28, "lm_head 4": 16, "qkv_proj 20": 4}
    assert list(calls) == ["lm_head 4", "qkv_proj 4", "qkv_proj 20"]
    assert planned("rms_norm", path)[1] == {"input_layernorm 4": 28, "input_layernorm 20": 4}
    definition = registry.operation("paged_attention").cases
    attention, _ = kernel_plan.cases_of(planned("paged_attention", path)[0], definition)
    assert {one.labels["length"]: one.calls for one in attention} == {8: 12, 16: 16}
    # Sparse products replace all linear layers but the head.
    _, sparse = planned("sparse_gemm", path, "--pattern", "2:4")
    assert sparse == {"qkv_proj 4": 28, "down_proj 4": 28, "qkv_proj 20": 4, "down_proj 20": 4}
    top, calls = planned("gemm", path, "--top", "1")
    assert calls == {"lm_head 4": 16}
    again = kernel_bench.parser().parse_args(top.command().split()[3:])
    assert kernel_plan.plan_of(again, registry.operation("gemm").cases) == top
    with pytest.raises(UsageError, match="the capture has no layer that silu_and_mul computes"):
        planned("silu_and_mul", path)
    with pytest.raises(UsageError, match="leave out --model and --tokens"):
        planned("gemm", path, "--tokens", "4")
    path.write_text("{}")
    with pytest.raises(UsageError, match="is not the record of a capture"):
        planned("gemm", path)


def test_the_watch_times_the_costliest_shapes_of_a_capture(here: Path) -> None:
    capture.run(read(Capture, {"FROM": str(left(here / "shapes", worker()))}))
    (path,) = (here / "records").glob("*.json")
    gemm = registry.operation("gemm").backend("reference")
    shapes = loop.captured(str(path), 2, [gemm])
    times, summary = fork_server.measure(gemm, torch.device("cpu"), shapes)
    assert {name: one.calls for name, one in times.items()} == {
        "toy lm_head M=4 N=512 K=128": 8, "toy qkv_proj M=4 N=256 K=128": 14
    }  # fmt: skip
    assert all(one.microseconds for one in times.values())
    assert summary[0].startswith(f"{path.name}: 2 of 3 shapes, about ")
    assert summary[1].startswith("reference, all calls at 2 of them: ")
    verdict = judge(1, "gemm.reference", Inspected((), ()), Checked(3, (), times, summary), 1.0)
    assert verdict.remarks == ("3 cases right", *summary)
    in_all = sum((one.microseconds or 0) * (one.calls or 0) for one in times.values()) / 1000
    lines = figures(verdict, verdict)
    assert all(line.endswith((" 8 calls", " 14 calls")) for line in lines)
    drawn = io.StringIO()
    with LiveScreen("watching", Console(width=160, file=drawn)) as screen:
        screen.show(verdict)
    assert f" {in_all:.3g} ms " in drawn.getvalue()


def test_shapes_that_the_watch_cannot_use_are_refused_at_its_start(here: Path) -> None:
    capture.run(read(Capture, {"FROM": str(left(here / "shapes", worker()))}))
    (path,) = (here / "records").glob("*.json")
    backends = loop.chosen("gemm.triton,silu_and_mul.triton")
    with pytest.raises(WorkspaceError, match="the capture has no layer that silu_and_mul"):
        loop.run(Watch(k="gemm.triton,silu_and_mul.triton", shapes=str(path)))
    path.write_text("{}")
    with pytest.raises(WorkspaceError, match="is not the record of a capture"):
        loop.captured(str(path), 2, backends)
    with pytest.raises(WorkspaceError, match="name its record with SHAPES="):
        Watch(k="gemm.triton", top=3)


def test_a_layer_is_named_by_what_its_places_have_in_common() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    layer = Layer(operation="gemm", rows="tokens", shape={}, method=None, names=names * 2)
    assert layer.label == "q_proj+k_proj"
