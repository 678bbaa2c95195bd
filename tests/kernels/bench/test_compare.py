# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.bench.compare``: faster, slower, same or ambiguous, and what differs
besides."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from custom_kernels.bench import compare
from custom_kernels.bench.compare import Ratio, Side
from custom_kernels.bench.record import RecordError
from hypothesis import given
from hypothesis import strategies as st

DATA = Path(__file__).parents[1] / "data"
A, B = DATA / "gemm_h200_a.json", DATA / "gemm_h200_b.json"
BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
H100 = BENCHMARKS / "kernels" / "gemm-cublaslt-h100.json"
ENGINE = BENCHMARKS / "engine"


def side(*ratios: Ratio, contender: str = "ours", **facts: str) -> Side:
    rows = {(f"M={number}", contender): ratio for number, ratio in enumerate(ratios)}
    return Side("kernels", rows, {"device": "H200", "baseline": "torch", **facts}, [])


def sharp(ratio: float, within: float = 0.001) -> Ratio:
    return Ratio(ratio, ratio * (1 - within), ratio * (1 + within))


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (sharp(1.0), sharp(1.1), "faster"),
        (sharp(1.1), sharp(1.0), "slower"),
        (sharp(1.3), sharp(1.31), "same"),
        (sharp(1.0), sharp(1.021), "same"),  # more than 2 %, but not surely, and surely within 3 %
        (sharp(1.0), sharp(1.03, within=0.02), "ambiguous"),
        (sharp(1.0), sharp(1.1, within=0.1), "ambiguous"),
        (sharp(1.0, within=0.1), sharp(1.1), "ambiguous"),  # the record before was not sure
        (sharp(0.5), sharp(0.6), "faster"),  # both slower than the baseline
    ],
)
def test_a_row_is_faster_slower_same_or_ambiguous(
    before: Ratio, after: Ratio, verdict: str
) -> None:
    result = compare.compare(side(before), side(after))
    assert [change.ratio.verdict for change in result.changes] == [verdict]
    assert result.ratio.verdict == verdict
    assert result.ratio.value == pytest.approx(after.value / before.value)


RATIOS = st.tuples(st.floats(0.2, 5), st.floats(0, 0.2), st.floats(0, 0.2)).map(
    lambda t: Ratio(t[0], t[0] * (1 - t[1]), t[0] * (1 + t[2]))
)


@given(st.lists(st.tuples(RATIOS, RATIOS), min_size=1, max_size=5))
def test_the_other_way_round_is_the_inverse(pairs: list[tuple[Ratio, Ratio]]) -> None:
    a, b = side(*(pair[0] for pair in pairs)), side(*(pair[1] for pair in pairs))
    forward, back = compare.compare(a, b), compare.compare(b, a)
    assert forward.ratio.value == pytest.approx(1 / back.ratio.value)
    assert forward.ratio.low == pytest.approx(1 / back.ratio.high)
    for change in forward.changes:
        assert change.ratio.low <= change.ratio.value <= change.ratio.high
        # Wider than either alone, narrower than both together.
        assert change.ratio.low >= change.after.low / change.before.high * (1 - 1e-9)
        assert change.ratio.low <= change.after.low / change.before.value * (1 + 1e-9)
    assert forward.ratio.low <= forward.ratio.value <= forward.ratio.high


def test_the_interval_covers_the_true_change_as_often_as_it_says() -> None:
    draw = random.Random(1)

    def noisy(truth: float) -> Ratio:
        value = truth * math.exp(draw.gauss(0, 0.01))
        return Ratio(value, value * math.exp(-0.0196), value * math.exp(0.0196))

    changes = [compare.compare(side(noisy(1.2)), side(noisy(1.5))).ratio for _ in range(3000)]
    hits = sum(change.low <= 1.25 <= change.high for change in changes)
    assert 0.935 < hits / 3000 < 0.965


def test_the_verdict_over_all_is_the_geometric_mean() -> None:
    result = compare.compare(side(sharp(1.0), sharp(1.0)), side(sharp(1.2), sharp(1 / 1.2)))
    assert [change.ratio.verdict for change in result.changes] == ["faster", "slower"]
    assert result.ratio.value == pytest.approx(1)
    assert result.ratio.verdict == "same"


def test_what_differs_besides_is_said() -> None:
    a = side(sharp(1), sharp(1), device="H100")
    b = side(sharp(1), contender="ours", baseline="vllm")
    notes = compare.compare(a, b).notes
    assert "device differs: H100 in A, H200 in B" in notes
    assert "baseline differs: torch in A, vllm in B" in notes
    assert "1 of 2 rows are in A only and left out" in notes


def test_two_backends_can_be_compared_when_each_record_has_one() -> None:
    result = compare.compare(side(sharp(1), contender="triton"), side(sharp(2), contender="skinny"))
    assert result.changes[0].contender == "triton -> skinny"
    assert result.ratio.value == pytest.approx(2)
    assert "the contenders differ: triton in A, skinny in B" in result.notes


def test_nothing_in_common_is_an_error() -> None:
    b = Side("kernels", {("M=9", "ours"): sharp(1)}, {}, [])
    with pytest.raises(RecordError, match=r"in common: A has ours at M=0, B has ours at M=9"):
        compare.compare(side(sharp(1)), b)
    with pytest.raises(RecordError, match="A is a record of the kernels bench and B of the engine"):
        compare.compare(side(sharp(1)), Side("engine", {}, {}, []))


# --- real records ---------------------------------------------------------------------------------


def test_two_runs_of_the_same_kernels_are_the_same() -> None:
    """Recorded one after the other on an H200, the second at lower clocks than the first."""
    result = compare.compare(compare.read(A), compare.read(B))
    assert result.ratio.verdict == "same"
    assert len(result.changes) == 10
    assert {change.ratio.verdict for change in result.changes} <= {"same", "ambiguous"}
    assert all(abs(change.ratio.value - 1) < 0.01 for change in result.changes)
    times = [
        [row["contenders"]["torch"]["us"] for row in json.loads(path.read_text())["rows"]]
        for path in (A, B)
    ]
    moved = [new / old for old, new in zip(*times, strict=True)]
    assert max(moved) > 1.03  # which is why ratios are compared, and not times


def test_a_slower_backend_in_a_real_record_is_found(tmp_path: Path) -> None:
    record = json.loads(B.read_text())
    for row in record["rows"]:
        ours = row["contenders"]["cublaslt"]
        for name in ("ratio", "low", "high"):
            ours[name] /= 1.2
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(record))
    result = compare.compare(compare.read(A), compare.read(slower))
    assert result.ratio.verdict == "slower"
    assert [change.ratio.verdict for change in result.changes].count("slower") == 10


def test_records_of_both_schemas_and_devices_compare() -> None:
    result = compare.compare(compare.read(H100), compare.read(A))
    assert "device differs: NVIDIA H100 80GB HBM3 in A, NVIDIA H200 in B" in result.notes
    assert "baseline differs: reference in A, torch in B" in result.notes
    assert "130 of 140 rows are in A only and left out" in result.notes


def test_engine_records_compare_whichever_way_their_figure_points(tmp_path: Path) -> None:
    path = ENGINE / "qwen2.5-0.5b-latency-h100.json"
    record = json.loads(path.read_text())
    (ratio,) = compare.read(path).ratios.values()
    low, high = record["comparison"]["interval"]
    assert record["unit"] == "s"  # less is faster
    assert (ratio.low, ratio.high) == (1 / high, 1 / low)
    faster = copy.deepcopy(record)
    faster["comparison"]["ratio"] = 0.5
    faster["comparison"]["interval"] = [0.499, 0.501]
    (tmp_path / "b.json").write_text(json.dumps(faster))
    settled = copy.deepcopy(faster)
    settled["comparison"]["ratio"], settled["comparison"]["interval"] = 1.0, [0.999, 1.001]
    (tmp_path / "a.json").write_text(json.dumps(settled))
    result = compare.compare(compare.read(tmp_path / "a.json"), compare.read(tmp_path / "b.json"))
    assert result.ratio.verdict == "faster"
    assert result.ratio.value == pytest.approx(2)
    assert any("ambiguous" in note for note in compare.compare(
        compare.read(path), compare.read(path)
    ).notes)  # fmt: skip


def test_throughput_points_the_other_way() -> None:
    path = ENGINE / "tiny-qwen2-throughput-cpu.json"
    (ratio,) = compare.read(path).ratios.values()
    assert ratio.value == json.loads(path.read_text())["comparison"]["ratio"]


def test_settings_that_an_older_record_does_not_have_are_what_they_were(tmp_path: Path) -> None:
    path = ENGINE / "tiny-qwen2-throughput-cpu.json"
    record = json.loads(path.read_text())
    differs = "pipeline_parallel differs: 1 in A, 2 in B"
    for stages, says in ((1, ""), (2, differs)):
        record["settings"] |= {"pipeline_parallel": stages, "executor": "mp"}
        (tmp_path / "b.json").write_text(json.dumps(record))
        notes = compare.compare(compare.read(path), compare.read(tmp_path / "b.json")).notes
        assert "".join(note for note in notes if "parallel" in note or "executor" in note) == says


# --- the command ----------------------------------------------------------------------------------


def run(*paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "custom_kernels.bench.compare", *map(str, paths)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_prints_rows_and_a_verdict() -> None:
    done = run(A, B)
    assert (done.returncode, done.stderr) == (0, "")
    assert "qwen2.5-0.5b o M=1 N=896 K=896" in done.stdout
    assert "B against A: same, geometric mean 0.999" in done.stdout
    assert "over 10 rows: 9 same, 1 ambiguous" in done.stdout


def test_make_compare_says_which_variables_it_needs() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("A", "B")}
    done = subprocess.run(
        [sys.executable, "-m", "workspace", "compare"],
        cwd=BENCHMARKS.parent, env={**environment, "A": str(A)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: name two records: make compare A=before.json B=after.json\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("", "is not JSON"),
        ("[]", "is no JSON object"),
        ("{}", "is not the record of a kernel benchmark"),
        ('{"comparison": {}}', "the run is not valid"),
        ('{"comparison": {}, "valid": true}', "is not a whole record: settings: Field required"),
        ('{"comparison": {}, "valid": false, "failures": ["no launch"]}', "not valid: no launch"),
    ],
)
def test_an_unusable_file_is_one_clear_error(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "b.json"
    if content is not None:
        path.write_text(content)
    assert compare.main([str(A), str(path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("low", [None, math.nan, -1.0])
def test_a_ratio_without_an_interval_is_an_error(tmp_path: Path, low: float | None) -> None:
    record = json.loads(A.read_text())
    record["rows"][0]["contenders"]["cublaslt"]["low"] = low
    path = tmp_path / "a.json"
    path.write_text(json.dumps(record))
    with pytest.raises(RecordError, match="not a number with an interval"):
        compare.read(path)


def test_a_record_without_any_ratio_is_an_error(tmp_path: Path) -> None:
    record = json.loads(A.read_text())
    for row in record["rows"]:
        row["contenders"] = {"torch": row["contenders"]["torch"]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(record))
    with pytest.raises(RecordError, match="has no ratio"):
        compare.read(path)
