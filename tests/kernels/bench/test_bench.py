# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.bench``: what it plans, records, shows and draws; on a GPU, all of it
at once."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from custom_kernels import registry
from custom_kernels.bench import __main__ as command
from custom_kernels.bench import plan as plans
from custom_kernels.bench import plots, record, report, timing
from custom_kernels.bench.intervals import Verdict
from custom_kernels.bench.record import Ceilings, Failed, Provenance, Record, Row, Timed
from custom_kernels.bench.run import failed
from custom_kernels.check.case import Contender, contender_of
from custom_kernels.command import UsageError
from custom_kernels.gemm import cases as gemm_cases
from rich.console import Console

DATA = Path(__file__).parents[1] / "data"
H200 = DATA / "gemm_h200_a.json"
RECORDED = Path(__file__).resolve().parents[3] / "benchmarks" / "kernels"
H100 = RECORDED / "gemm-cublaslt-h100.json"
CPU = torch.device("cpu")


def bench_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "custom_kernels.bench", *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def options(*arguments: str) -> argparse.Namespace:
    return command.parser().parse_args(["gemm", *arguments])


def shown(run: Record) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report.table(run))
    return capture.get()


def a_record(rows: list[Row], ceilings: Ceilings, **changes: Any) -> Record:
    """A record of these rows, whose first contender is the baseline."""
    baseline, *others = rows[0].contenders
    fields: dict[str, Any] = {
        "operation": "gemm", "dtype": "bfloat16", "baseline": baseline, "backends": others,
        "baselines": [baseline], "skipped": {}, "ceilings": ceilings,
        "summary": record.summary(rows, baseline), "failures": [], "warnings": [], "rows": rows,
        "provenance": Provenance(time="2026-11-23T10:05:18+00:00", device="a CPU", command="none"),
    }  # fmt: skip
    return Record(**fields | changes)


def run_on_cpu(tmp_path: Path, contenders: Sequence[Contender]) -> Record:
    """A record of a real run, of small shapes and on the CPU: the harness runs there as well."""
    from custom_kernels.gemm.reference import exact

    ceilings = Ceilings(bytes_per_second=1e10, flops_per_second={"bfloat16": 1e11})
    small = [
        gemm_cases.case({"model": "toy", "layer": "qkv"}, m, 256, 64, True, "bfloat16")
        for m in (1, 16)
    ]
    rows = [timing.measure(case, contenders, exact, CPU, 0.01, ceilings=ceilings) for case in small]
    run = a_record(rows, ceilings)
    assert record.read(record.write(run, tmp_path)) == run
    return run


# --- what is asked for ----------------------------------------------------------------------------


def test_a_plan_has_every_default_filled_in() -> None:
    plan = plans.plan_of(options(), gemm_cases)
    assert plan.models == list(gemm_cases.DEFAULT_MODELS)
    assert plan.tokens == list(gemm_cases.TOKENS)
    assert plan.dtype == gemm_cases.DTYPES[0]
    assert plan.backends is None
    assert plans.plan_of(options("--backend", "all"), gemm_cases).backends is None


def test_a_model_may_have_its_name_on_the_hub() -> None:
    plan = plans.plan_of(options("--model", "Qwen/Qwen2.5-7B", "--model", "qwen2.5-7b"), gemm_cases)
    assert plan.models == ["qwen2.5-7b"]


def test_the_command_of_a_plan_gives_the_same_plan() -> None:
    given = options(
        "--model", "qwen2.5-7b", "--tokens", "1", "64", "--backend", "cublaslt,reference",
        "--dtype", "float16", "--seconds", "0.1", "--repetitions", "2", "--pattern", "6:8",
    )  # fmt: skip
    plan = plans.plan_of(given, gemm_cases)
    command = plan.command().split()
    assert command[:4] == ["python", "-m", "custom_kernels.bench", "gemm"]
    assert plans.plan_of(options(*command[4:]), gemm_cases) == plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "qwen9"], "no model qwen9; known: qwen2.5-0.5b"),
        (["--dtype", "int4"], "no dtype int4; known: bfloat16, float16"),
        (["--backend", "cublastl"], "no backend cublastl; known: "),
        (["--tokens", "0"], "must be positive"),
        (["--seconds", "-1"], "must be positive"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        plans.plan_of(options(*arguments), gemm_cases)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_patterns_choose_among_the_cases() -> None:
    def cases(models: Sequence[str], tokens: Sequence[int], dtype: str) -> list[Any]:
        return [SimpleNamespace(labels={"M": 1, "pattern": name}) for name in ("2:4", "6:8", None)]

    definition: Any = SimpleNamespace(cases=cases)
    plan = plans.plan_of(options("--pattern", "6:8"), gemm_cases)
    cases, _ = plans.cases_of(plan, definition)
    assert [case.labels["pattern"] for case in cases] == ["6:8"]
    with pytest.raises(UsageError, match=r"no pattern 6:8; known: none"):
        plans.cases_of(plan, gemm_cases)


def contender(name: str, reason: str | None = None) -> Contender:
    return Contender(name, lambda *_: None, unavailable_reason=lambda _: reason)


def test_contenders_are_all_that_can_run_and_the_rest_has_a_reason() -> None:
    """On a CPU: the reference only, and only where it is named."""
    definition: Any = SimpleNamespace(
        baselines=lambda dtype: [contender("torch"), contender("vllm", "vllm is not installed")],
        checks=gemm_cases.checks,
    )
    plan = plans.plan_of(options("--backend", "reference"), gemm_cases)
    contenders, ours, skipped = plans.contenders_of(plan, definition, CPU)
    assert [one.name for one in contenders] == ["torch", "reference"]
    assert ours == ["reference"]
    assert skipped == {"vllm": "vllm is not installed"}
    with pytest.raises(UsageError, match=r"cublaslt cannot run on cpu: it runs on CUDA"):
        plans.contenders_of(
            plans.plan_of(options("--backend", "cublaslt"), gemm_cases), definition, CPU
        )


def test_a_backend_called_like_a_baseline_says_that_it_is_ours() -> None:
    definition: Any = SimpleNamespace(
        baselines=lambda dtype: [contender("reference")], checks=gemm_cases.checks
    )
    plan = plans.plan_of(options("--backend", "reference"), gemm_cases)
    contenders, ours, _ = plans.contenders_of(plan, definition, CPU)
    assert [one.name for one in contenders] == ["reference", "reference (ours)"]
    assert ours == ["reference (ours)"]


def test_without_its_named_baseline_nothing_is_measured() -> None:
    definition: Any = SimpleNamespace(
        baselines=lambda dtype: [contender("vllm", "not installed"), contender("torch")]
    )
    with pytest.raises(UsageError, match="the baseline vllm cannot run on cpu: not inst"):
        plans.contenders_of(plans.plan_of(options(), gemm_cases), definition, CPU)


def test_an_operation_can_set_up_its_own_contenders() -> None:
    made: Any = SimpleNamespace(contender=lambda *arguments: arguments)
    backend = registry.operation("gemm").backend("triton")
    assert contender_of(backend, CPU, "int8", made) == (backend, CPU, "int8")


# --- what is recorded -----------------------------------------------------------------------------


def test_rates_are_set_against_what_was_measured() -> None:
    ceilings = Ceilings(bytes_per_second=2e12, flops_per_second={"int8": 8e12})
    found = record.rates(1e3, 4e12 * 1e-3, 1e9, "int8", ceilings)
    assert found.tflops == pytest.approx(4)
    assert found.gbytes_per_second == pytest.approx(1000)
    assert found.percent_of_copy == pytest.approx(50)
    assert found.percent_of_matmul == pytest.approx(50)
    assert found.percent_of_roofline == pytest.approx(50)
    longer = record.rates(1e3, 4e12 * 1e-3, 1.8e9, "int8", ceilings)
    assert longer.percent_of_roofline == pytest.approx(90)  # the bytes take longer
    assert record.rates(1e3, 1e9, 1e9, "bfloat16", ceilings).percent_of_matmul is None
    assert record.rates(1e3, 1e9, 1e9, "bfloat16", None).percent_of_roofline is None


def test_a_record_of_a_run_is_read_back_shown_and_drawn(tmp_path: Path) -> None:
    def wrong(*arguments: Any) -> Any:
        return 1.1 * gemm_cases.baselines("bfloat16")[0].run(*arguments)

    base = gemm_cases.baselines("bfloat16")[0]
    run = run_on_cpu(
        tmp_path,
        [base, Contender("same", base.run), Contender("wrong", wrong)],
    )
    assert run.rows[1].labels["M"] == 16
    failure = run.rows[0].contenders["wrong"]
    assert isinstance(failure, Failed)
    assert failure.failure.endswith("3.0e-03 is allowed")
    assert run.summary["same"]["toy"].shapes == 2
    assert "wrong" not in run.summary
    text = shown(run)
    assert "baseline" in text
    assert ", 3.0e-03 is allowed" in text
    drawn = plots.draw(run, tmp_path / "a.json")
    assert [path.name for path in drawn] == ["a-roofline.png", "a-ratio.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert not list(tmp_path.glob(".partial*"))


def test_a_record_that_failed_altogether_can_still_be_shown(tmp_path: Path) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no [such] thing")

    run = run_on_cpu(tmp_path, [Contender("a", broken), Contender("b", broken)])
    assert run.summary == {}
    assert "RuntimeError: no [such] thing" in shown(run)
    assert plots.draw(run, tmp_path / "a.json") == []


def a_row(model: str = "a", /, **contenders: Timed | Failed) -> Row:
    row = record.read(H200).rows[0]
    return row.model_copy(update={"labels": {"model": model}, "contenders": contenders})


def timed(ratio: float | None = None, verdict: Verdict | None = None) -> Timed:
    values = {"us": 1, "p20": 1, "p80": 1, "error": 0, "blocks": 9, "tflops": 1}
    return Timed(**values, gbytes_per_second=1, ratio=ratio, verdict=verdict)


@pytest.mark.parametrize(
    ("failing", "exit_status"),
    [("torch", True), ("cublaslt", True), ("vllm", False), (None, False)],
)
def test_the_run_failed_if_ours_or_the_baseline_did(failing: str | None, exit_status: bool) -> None:
    contenders: dict[str, Timed | Failed] = dict.fromkeys(("torch", "vllm", "cublaslt"), timed())
    failures: list[str] = []
    if failing:
        contenders[failing] = Failed(failure="wrong")
        failures = ["M=1: wrong"]
    ceilings = Ceilings(bytes_per_second=1, flops_per_second={})
    changes = {"backends": ["cublaslt"], "baselines": ["torch", "vllm"]}
    run = a_record([a_row(**contenders)], ceilings, failures=failures, **changes)
    assert failed(run) is exit_status
    more = [*failures, "M=2: the inputs do not fit"]
    assert failed(run.model_copy(update={"failures": more}))


def test_the_geometric_mean_is_over_the_rows_that_have_a_ratio() -> None:
    rows = [
        a_row("a", torch=timed(), ours=timed(2.0, "faster")),
        a_row("a", torch=timed(), ours=timed(0.5, "slower")),
        a_row("a", torch=timed(), ours=Failed(failure="wrong")),
        a_row("b", torch=timed(), ours=timed(4.0, "faster")),
    ]
    found = record.summary(rows, "torch")["ours"]
    assert found["a"].geometric_mean == pytest.approx(1)
    assert found["all"].geometric_mean == pytest.approx(4 ** (1 / 3))
    assert found["all"].verdicts == {"faster": 2, "slower": 1}
    assert found["b"].geometric_mean == pytest.approx(4)
    assert (found["b"].shapes, found["b"].lowest, found["b"].highest) == (1, 4, 4)


def test_a_capture_is_summed_up_by_the_times_of_all_calls(tmp_path: Path) -> None:
    def row(m: int, calls: int, us: float, ratio: float, other: Timed | Failed | None) -> Row:
        ours = timed(ratio).model_copy(update={"us": us, "low": ratio / 2, "high": 2 * ratio})
        contenders = {"torch": timed(), "ours": ours} | ({"other": other} if other else {})
        changes = {"labels": {"layer": "qkv", "M": m}, "calls": calls}
        return a_row(**contenders).model_copy(update=changes)

    # 100 calls of 1 µs that torch takes 3 µs for, and one of 50 µs that it takes 25 µs for.
    faster = timed(2.0).model_copy(update={"low": 1.5, "high": 2.5})
    rows = [row(4, 100, 1.0, 3.0, faster), row(64, 1, 50.0, 0.5, None)]
    rows.append(row(1, 7, 0.0, 1.0, Failed(failure="wrong")))
    found = record.weighted(rows, "torch")
    ours = found["ours"]
    assert ours.ratio == pytest.approx((100 * 3 + 25) / (100 * 1 + 50))
    assert (ours.low, ours.high) == pytest.approx((ours.ratio / 2, 2 * ours.ratio))
    assert (ours.shapes, ours.missing) == (3, [])
    assert found["other"].ratio == 2.0
    assert found["other"].missing == ["qkv M=64", "qkv M=1"]

    captured = record.Captured(file="capture.json", shapes=9, share=0.93)
    ceilings = Ceilings(bytes_per_second=1, flops_per_second={})
    run = a_record(rows, ceilings, captured=captured, weighted=found)
    assert record.read(record.write(run, tmp_path)) == run
    first, second, third, *_ = report.summary_lines(run)
    assert first == "capture.json: 3 of 9 shapes, about 93% of the cost of all calls"
    assert second.startswith("ours, all calls at 3 of them: 2.167 [1.083, 4.333] x torch")
    assert third.endswith("; it has no time for qkv M=64, qkv M=1")
    assert "calls" in shown(run)


# --- stored records -------------------------------------------------------------------------------


def test_every_record_in_git_is_still_read() -> None:
    paths = sorted(RECORDED.glob("*.json"))
    of_other_programs = {"sparse_gemm-wgmma-h200", "timing-h200"}
    assert len(paths) >= 6
    for path in paths:
        if path.stem in of_other_programs:
            with pytest.raises(record.RecordError, match="not the record of a kernel benchmark"):
                record.read(path)
        else:
            run = record.read(path)
            # A baseline that failed its check in a row is recorded as failed there.
            assert all(run.baseline in row.contenders for row in run.rows)
            assert sum(row.timed(run.baseline) is not None for row in run.rows) > len(run.rows) / 2
            assert Record.model_validate_json(run.model_dump_json(by_alias=True)) == run


def test_the_first_schema_is_read_as_the_current_one(tmp_path: Path) -> None:
    old, run = json.loads(H100.read_text()), record.read(H100)
    assert len(run.rows) == len(old["rows"]) == 140
    found, was = run.summary["cublaslt"], old["summary"]
    for model in ("qwen2.5-0.5b", "qwen2.5-7b", "all"):
        verdicts = {verdict.upper(): count for verdict, count in found[model].verdicts.items()}
        assert verdicts == was[model]["verdicts"]
        mean = pytest.approx(was[model]["geometric_mean"], abs=1e-3)
        assert found[model].geometric_mean == mean
    for row, before in zip(run.rows, old["rows"], strict=True):
        ours, labels = row.timed("cublaslt"), row.labels
        assert ours is not None
        assert ours.percent_of_roofline == pytest.approx(before["percent_of_floor"], rel=1e-3)
        product = 2 * int(labels["M"]) * int(labels["N"]) * int(labels["K"])
        assert row.flops == pytest.approx(product, rel=1e-3)
    assert "1.040 (1.039-1.041)" in shown(run)
    assert len(plots.draw(run, tmp_path / "old.json")) == 2


def test_a_stored_record_is_shown_without_a_gpu(tmp_path: Path) -> None:
    done = bench_command("--record", str(H200), "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "gemm bfloat16 on NVIDIA H200, baseline torch: copies 4." in done.stdout
    assert "cublaslt, qwen2.5-0.5b: geometric mean 1.075 x torch" in done.stdout
    assert "re-run: python -m custom_kernels.bench gemm --model qwen2.5-0.5b" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gemm_h200_a-ratio.png", "gemm_h200_a-roofline.png",
    ]  # fmt: skip


def test_the_summary_of_a_stored_record_follows_from_its_rows() -> None:
    run = record.read(H200)
    again = record.summary(run.rows, run.baseline)["cublaslt"]["qwen2.5-0.5b"]
    stored = run.summary["cublaslt"]["qwen2.5-0.5b"]
    assert again.verdicts == stored.verdicts
    assert math.isclose(again.geometric_mean, stored.geometric_mean, rel_tol=1e-4)
    for row in run.rows:
        for name in row.contenders:
            one = row.timed(name)
            assert one is not None
            rates = record.rates(one.us, row.flops, row.bytes, row.peak, run.ceilings).model_dump()
            assert one.model_dump(include=set(rates)) == pytest.approx(rates, rel=1e-4)
            if one.low is not None and one.high is not None:
                verdict = timing.verdict(one.low, one.high, one.blocks, one.repetitions)
                assert verdict == one.verdict


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"\xff\xfe", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1]", "is no JSON object"),
        (b"{}", "is not the record of a kernel benchmark"),
        (b'{"operation": "gemm", "rows": [{}], "schema": 2}', "is not a whole record"),
        (
            b'{"operation": "gemm", "rows": [], "schema": 9}',
            "of schema 9, which this version does not know",
        ),
        (b'{"operation": "gemm", "rows": 3, "schema": 1}', "is not a whole record"),
    ],
)
def test_a_bad_file_is_one_clear_error(
    tmp_path: Path, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    if content is not None:
        path.write_bytes(content)
    assert command.main(["--record", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert str(path) in error
    assert error.count("\n") == 1


def test_a_roofline_without_operations_is_drawn_over_bytes(tmp_path: Path) -> None:
    run = record.read(H200)
    rows = [row.model_copy(update={"flops": 0.0}) for row in run.rows]
    assert plots.roofline(run.model_copy(update={"rows": rows}), tmp_path / "a.png")


def test_the_times_quoted_for_other_harnesses_are_those_of_the_record() -> None:
    def text(*values: float) -> str:
        return " ".join(f"{value:.2f}" if value < 99.95 else f"{value:.0f}" for value in values)

    page = (RECORDED.parents[1] / "docs" / "measuring.md").read_text()
    rows = json.loads((RECORDED / "timing-h200.json").read_text())["rows"]
    assert len(rows) == 11
    for name, row in rows.items():
        cells = [
            text(*row["ours"]),
            text(*row["flashinfer"]),
            text(row["flashinfer, all rotations"]),
            text(row["nvbench cold"]),
            text(row["nvbench batch"]),
        ]
        assert f"| {name} | {' | '.join(cells)} |" in page


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_what_to_run_instead() -> None:
    done = bench_command("gemm")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "error: timing kernels needs a GPU and torch sees none; without one, `make test K=gemm` "
        "checks them and `make inspect K=gemm` shows what the compilers made of them\n"
    )


def test_without_an_operation_one_line_says_so() -> None:
    done = bench_command()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: name an operation, or a record with --record\n"


@pytest.mark.gpu
def test_a_run_on_a_gpu_records_shows_and_draws(tmp_path: Path) -> None:
    done = bench_command(
        "gemm", "--model", "qwen2.5-0.5b", "--tokens", "16", "--backend", "cublaslt,reference",
        "--seconds", "0.05", "--output", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    run = record.read(path)
    assert run.failures == []
    assert len(run.rows) == 5
    assert {"torch", "cublaslt", "reference"} <= set(run.rows[0].contenders)
    for row in run.rows:
        reference, cublaslt = row.timed("reference"), row.timed("cublaslt")
        # It is what torch does, through one more Python call that no graph replay sees.
        assert reference is not None
        assert reference.verdict in ("same", "ambiguous")
        assert cublaslt is not None
        assert cublaslt.ratio is not None
        assert cublaslt.ratio > 0.9
    assert run.provenance.command in done.stdout.replace("\n", " ")
    assert len(list(tmp_path.glob("*.png"))) == 2
