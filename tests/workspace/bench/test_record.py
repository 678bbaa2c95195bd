# SPDX-License-Identifier: Apache-2.0
"""The record of a run: complete, readable again, drawn, printed; invalid when a proof failed."""

import struct
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from tests.workspace.bench.samples import generation, plan, result, sparse_model
from workspace.bench import chart, checks, record, report
from workspace.bench.evaluate import evaluate
from workspace.bench.measure import ProcessRun
from workspace.bench.variants import stock_and_custom
from workspace.host.paths import BENCHMARKS

RAN = {11: {"gemm.reference": 40}}


def make(
    change: Callable[[list[ProcessRun]], None] = lambda _: None, **settings: object
) -> record.Record:
    """The record of a run S C C S of the sample plan, after `change` to its processes."""
    made = plan(**settings)
    stock, custom = stock_and_custom(made)
    fast, slow = (0.8, 0.81, 0.82), (1.0, 1.01, 1.02)
    done = [
        ProcessRun(1, 0, stock, result(slow)),
        ProcessRun(2, 0, custom, result(fast, RAN)),
        ProcessRun(3, 1, custom, result(fast, RAN)),
        ProcessRun(4, 1, stock, result(slow)),
    ]
    change(done)
    started = datetime(2026, 11, 23, tzinfo=UTC)
    return evaluate(made, (stock, custom), done, "20261123-tiny", started, load=0.1)


def test_sound_run_is_valid_and_its_ratio_is_custom_over_stock() -> None:
    made = make()
    assert made.valid
    assert made.failures == []
    assert made.comparison.ratio == pytest.approx(1.25, rel=0.01)
    assert made.comparison.verdict == "faster"
    stock, custom = made.variants
    assert (stock.launches, custom.launches) == ({}, {"gemm.reference": 80})
    assert stock.median == pytest.approx(36 / 1.01)
    assert [p.order for p in custom.processes] == [2, 3]


def test_record_survives_the_file(tmp_path: Path) -> None:
    made = make()
    record.write(made, tmp_path / "r.json")
    assert record.read(tmp_path / "r.json") == made


def test_every_record_in_git_is_still_read_and_shown_with_todays_wording() -> None:
    paths = sorted((BENCHMARKS / "engine").glob("*.json"))
    assert len(paths) >= 15
    for path in paths:
        read = record.read(path)
        assert read.variants[1].processes
        assert not any(old in read.note + read.comparison.because for old in record.REWORDED)
        assert read.note.startswith(record.CPU_NOTE) == (read.device_kind == "cpu")


def test_a_sparse_model_with_its_own_weights_has_to_agree_and_with_others_not() -> None:
    other = generation((9, 8, 7))

    def differ(done: list[ProcessRun]) -> None:
        for run in done:
            if run.variant.launches:
                run.result.generations[:] = [other]
                run.result.layers[11] = {"down_proj": {"sparse_gemm.reference": 3}}

    same = make(differ, model=sparse_model(), baseline="int8")
    assert not same.valid
    assert "log-probabilities differ" in same.failures[0]
    assert same.note.endswith("int8 loads the same weights as dense ones")
    lossy = make(differ, model=sparse_model(), baseline="bf16")
    assert lossy.valid
    assert lossy.agreement.lossy
    assert lossy.note.endswith("custom is quantized (2:4 int8) and computes something else")
    assert lossy.model.quantized == "2:4 int8"
    assert "2:4 int8" in str(report.table(lossy).title)


def test_every_layer_of_a_sparse_model_must_run_a_custom_kernel() -> None:
    def miss(done: list[ProcessRun]) -> None:
        layers = {"a": {"sparse_gemm.reference": 3}, "b": {}}
        for run in done:
            if run.variant.launches:
                run.result.layers[11] = layers

    made = make(miss, model=sparse_model(), baseline="int8")
    assert made.failures[0] == "custom (process 2): layer b did not run a custom kernel"


def test_record_names_weights_device_sources_and_how_to_repeat_it() -> None:
    made = make()
    assert (made.model.weights, made.model.seed) == ("random", plan().model.seed)
    assert made.note == "CPU run: only the ratio is meaningful"
    assert made.command.startswith("make bench MODEL=tiny-qwen2 ")
    assert made.variants[1].command.startswith("HF_HUB_OFFLINE=1")
    assert "VLLM_USE_CUSTOM_GEMM=1" in made.variants[1].command
    assert "VLLM_USE_CUSTOM_GEMM" not in made.variants[0].command
    assert made.provenance.workspace is not None
    assert len(made.provenance.workspace.commit) == 40
    assert made.provenance.environment["vllm"] == "0.25.1+cpu"
    assert made.provenance.cores >= 1


def test_record_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    text = make().model_dump_json()
    for other in (text.replace('"schema_version":1', '"schema_version":2'), text[:-1], "{}"):
        path.write_text(other)
        with pytest.raises(ValidationError):
            record.read(path)


def drop_launches(done: list[ProcessRun]) -> None:
    done[2].result.launches.clear()


def launch_in_stock(done: list[ProcessRun]) -> None:
    done[3].result.launches.update(RAN)


def lose_a_token(done: list[ProcessRun]) -> None:
    done[1].result.rounds[2].output_tokens -= 1


def disagree(done: list[ProcessRun]) -> None:
    done[2].result.generations[0] = generation((7, 99, 9))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (drop_launches, "custom (process 3): gemm ran in 0 of 1 worker processes"),
        (launch_in_stock, "stock (process 4): launched custom kernels"),
        (lose_a_token, "custom (process 2), round 3: 11 new tokens, 12 expected"),
        (disagree, "log-probabilities differ"),
    ],
)
def test_each_planted_fault_makes_the_run_invalid(
    fault: Callable[[list[ProcessRun]], None], says: str, tmp_path: Path
) -> None:
    made = make(fault)
    assert not made.valid
    assert any(says in failure for failure in made.failures)
    assert all("\n" not in failure for failure in made.failures)
    record.write(made, tmp_path / "r.json")
    assert not record.read(tmp_path / "r.json").valid


def quantized(done: list[ProcessRun]) -> None:
    for ran in (done[1], done[2]):
        ran.result.launches = {11: {"sparse_gemm.reference": 9, "quant_expand.reference": 9}}
        ran.result.layers = {11: {"model.layers.0.mlp.down_proj": {"sparse_gemm.reference": 9}}}
        ran.result.generations = [generation((7, 99, 9))]


def quantized_and_idle(done: list[ProcessRun]) -> None:
    quantized(done)
    unused: dict[str, int] = {}
    done[1].result.layers[11]["lm_head"] = unused


def quantized_at_random(done: list[ProcessRun]) -> None:
    quantized(done)
    done[2].result.generations = [generation((7, 8, 9))]


def test_a_quantized_run_shows_its_distance_from_stock_and_proves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(quantized, quantization="sparse_2_4")
    assert made.failures == []
    assert made.agreement.lossy
    assert made.agreement.matched == 1
    assert made.candidate_with_itself is not None
    monkeypatch.setattr(report, "console", console := Console(width=200, record=True))
    report.show(made, tmp_path / "r.json", tmp_path / "r.png")
    text = console.export_text()
    for words in ("not a proof: 1 of 2 greedy", "custom is quantized (sparse_2_4)",
                  "custom against itself: 3 of 3", "QUANTIZATION=sparse_2_4"):  # fmt: skip
        assert words in text
    (failure,) = make(quantized_and_idle, quantization="sparse_2_4").failures
    assert failure == "custom (process 2): layer lm_head did not run a custom kernel"
    (failure,) = make(quantized_at_random, quantization="sparse_2_4").failures
    assert failure.startswith("custom against itself: outputs: ")


def test_a_variant_may_differ_from_itself_by_twice_what_stock_does() -> None:
    agreement = make().agreement
    stock = agreement.model_copy(update={"largest": 0.4, "mean": 0.03})
    far = agreement.model_copy(update={"largest": 0.7, "mean": 0.02, "failures": ["they differ"]})
    assert checks.steady(agreement, None)
    assert checks.steady(far, stock)
    assert not checks.steady(far, None)
    assert not checks.steady(far.model_copy(update={"largest": 0.9}), stock)
    assert not checks.steady(far.model_copy(update={"mean": 0.07}), stock)
    assert not checks.steady(far.model_copy(update={"failures": ["they differ", "no step"]}), stock)
    flat = far.model_copy(update={"largest": 0.1, "failures": ["all are about equally likely"]})
    assert not checks.steady(flat, stock)


def pixels(path: Path) -> tuple[int, int, set[bytes]]:
    """Width, height and the distinct rows of a PNG, by its own chunks."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    raw, at = b"", 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            raw += data[at + 8 : at + 8 + length]
        at += length + 12
    rows = zlib.decompress(raw)
    stride = len(rows) // height
    return width, height, {rows[i * stride : (i + 1) * stride] for i in range(height)}


def test_picture_is_drawn_and_shows_what_was_measured(tmp_path: Path) -> None:
    chart.draw(make(), tmp_path / "valid.png")
    chart.draw(make(drop_launches), tmp_path / "invalid.png")
    width, height, rows = pixels(tmp_path / "valid.png")
    assert (width, height) == (1280, 800)
    assert len(rows) > 200
    assert rows != pixels(tmp_path / "invalid.png")[2]


def test_words_of_the_picture_name_weights_device_and_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib.text

    drawn: list[str] = []
    original = matplotlib.text.Text.draw

    def draw(self: matplotlib.text.Text, *args: Any, **kwargs: Any) -> None:
        drawn.append(self.get_text())
        original(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.text.Text, "draw", draw)
    made = make()
    chart.draw(made, tmp_path / "r.png")
    words = "\n".join(drawn)
    ratio = f"{made.comparison.ratio:.3f}"
    for expected in ("random weights, seed 20251", made.device, ratio, "faster", made.note):
        assert expected in words


def test_table_shows_both_sides_with_their_weights_and_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "console", console := Console(width=120, record=True))
    report.show(make(), tmp_path / "r.json", tmp_path / "r.png")
    text = console.export_text()
    expected = ("random weights (seed 20251)", "stock", "custom", "gemm.reference: 80 in")
    for words in (*expected, "only the ratio", "faster", "make bench MODEL=", "r.json", "r.png"):
        assert words in text
    assert "INVALID" not in text
    report.show(make(drop_launches), tmp_path / "r.json", tmp_path / "r.png")
    assert "INVALID" in console.export_text()


def test_a_compiled_stock_that_merges_what_we_run_alone_is_said() -> None:
    said = "torch.compile merges stock's rms_norm with what is around them"
    assert said in make(op="rms_norm,gemm", eager=False).note
    assert said not in make(op="rms_norm", eager=True).note
    assert said not in make(eager=False).note
