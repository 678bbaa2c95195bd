# SPDX-License-Identifier: Apache-2.0
"""Stock against itself, and the band that a verdict has to leave."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from tests.workspace.bench.samples import plan, result
from tests.workspace.bench.test_record import make
from workspace.bench import noise, record, report
from workspace.bench.compare import of_record
from workspace.bench.evaluate import evaluate
from workspace.bench.measure import ProcessRun
from workspace.bench.plan import repeat_command
from workspace.bench.record import Noise
from workspace.bench.variants import stock_and_itself

STARTED = datetime(2026, 11, 23, tzinfo=UTC)


def against_itself(factor: float, run: str, **settings: object) -> record.Record:
    """The record of such a run, the second of which took `factor` times as long."""
    made = plan(baseline="self", **settings)
    stock, again = variants = stock_and_itself(made)
    seconds = (1.0, 1.01, 1.02)
    later = tuple(factor * one for one in seconds)
    done = [
        ProcessRun(1, 0, stock, result(seconds)),
        ProcessRun(2, 0, again, result(later)),
        ProcessRun(3, 1, again, result(later)),
        ProcessRun(4, 1, stock, result(seconds)),
    ]
    return evaluate(made, variants, done, run, STARTED, load=0.1)


def test_neither_side_launches_and_the_record_says_what_it_is() -> None:
    made = against_itself(1.0, "a")
    assert made.valid
    assert [(one.name, one.launches) for one in made.variants] == [("stock", {}), ("again", {})]
    assert "stock against itself: whatever differs is noise" in made.note
    assert repeat_command(plan(baseline="self")).endswith(" BASELINE=self")


def test_the_band_is_the_largest_ratio_of_runs_like_this_one(tmp_path: Path) -> None:
    like = make()
    assert noise.of_runs(noise.runs(tmp_path, like)) is None
    for number, factor in enumerate((1.01, 1 / 1.03, 1.02)):
        made = against_itself(factor, f"{number}")
        record.write(made, tmp_path / f"{number}.json")
    other = against_itself(1.5, "other", tensor_parallel=2)
    record.write(other, tmp_path / "other.json")
    record.write(like, tmp_path / "like.json")
    (tmp_path / "old.json").write_text('{"name": "again"}')
    found = noise.of_runs(noise.runs(tmp_path, like))
    assert found
    assert (found.runs, found.band) == (3, pytest.approx(0.03))
    assert found.freedom == 3 * 2


def test_a_verdict_has_to_leave_the_band(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make()
    assert (made.comparison.verdict, made.comparison.interval[0] > 1.2) == ("faster", True)
    clear = of_record(made, Noise(runs=5, band=0.15))
    assert (clear.verdict, clear.because) == ("faster", made.comparison.because)
    hidden = of_record(made, Noise(runs=5, band=0.3))
    assert hidden.verdict == "ambiguous"
    assert hidden.because == "stock differs from itself by up to 30.0% here"
    assert of_record(made) == made.comparison
    # Processes that are further apart than the two pairs of this run showed make it wider.
    wide = of_record(made, Noise(runs=5, band=0.15, squares=10 * 0.3**2, freedom=10))
    assert wide.interval[0] < 1 < made.comparison.interval[0]
    made.comparison = hidden
    monkeypatch.setattr(report, "console", console := Console(width=120, record=True))
    report.show(made, Path("r.json"), Path("r.png"))
    assert "noise here: stock against itself within ±30.0% in 5 runs" in console.export_text()
