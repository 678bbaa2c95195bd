# SPDX-License-Identifier: Apache-2.0
"""The time left: by the estimate, by what was measured, on a terminal and in a log."""

import io
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from tests.workspace.bench.samples import plan
from workspace.bench import processes, report
from workspace.bench.messages import Event, Stage
from workspace.bench.time_left import TimeLeft
from workspace.environment import progress
from workspace.verbs import Bench

STEPS: list[tuple[Stage, int]] = [
    ("importing vLLM", 0), ("starting the engine", 0), ("warming up", 1), ("warming up", 2),
    ("round", 1), ("round", 2), ("round", 3), ("comparing outputs", 0), ("stopping", 0),
]  # fmt: skip
SECONDS: dict[Stage, float] = {
    "importing vLLM": 10, "starting the engine": 20, "warming up": 4, "round": 3,
    "comparing outputs": 6, "stopping": 1,
}  # fmt: skip
WHOLE = 10 + 20 + 2 * 4 + 3 * 3 + 6 + 1


def process(clock: TimeLeft, begin: float, rate: float) -> Iterator[tuple[float, float | None]]:
    """A process in which every step takes `rate` times `SECONDS`: (time, left) amid each step."""
    now = begin
    clock.start(now)
    for stage, number in STEPS:
        clock.step(Event(stage=stage, number=number, of=3 if stage == "round" else 0), now)
        yield now + SECONDS[stage] * rate / 2, clock.left(now + SECONDS[stage] * rate / 2)
        now += SECONDS[stage] * rate
    clock.end(now)


def test_time_left_is_right_where_the_estimate_is() -> None:
    clock = TimeLeft(SECONDS, 3, ["stock", "custom"])
    for begin in (0, WHOLE):
        for now, left in process(clock, begin, 1.0):
            assert left == pytest.approx(2 * WHOLE - now)
    assert clock.left(2 * WHOLE) == 0


def test_without_an_estimate_the_first_process_tells() -> None:
    clock = TimeLeft({}, 3, ["stock", "custom", "custom", "stock"])
    assert [left for _, left in process(clock, 0, 1.0)] == [None] * len(STEPS)
    assert clock.left(WHOLE) == pytest.approx(3 * WHOLE)


def test_each_variant_has_its_own_time() -> None:
    clock = TimeLeft(SECONDS, 3, ["stock", "custom", "custom", "stock"])
    list(process(clock, 0, 1.0))
    list(process(clock, WHOLE, 5.0))
    assert clock.left(6 * WHOLE) == pytest.approx(6 * WHOLE)
    list(process(clock, 6 * WHOLE, 5.0))
    assert clock.left(11 * WHOLE) == pytest.approx(WHOLE)


def test_a_round_that_takes_longer_moves_the_end() -> None:
    clock = TimeLeft(SECONDS, 3, ["stock"])
    clock.start(0)
    clock.step(Event(stage="round", number=1, of=3), 0)
    assert clock.left(3) == 2 * 3 + 6 + 1
    assert clock.left(30) == 2 * 30 + 6 + 1


def follow(tmp_path: Path, seconds: float) -> None:
    """Follow a process of one event, then silence."""
    live_order = ["stock", "custom"]
    with report.progress(live_order, TimeLeft(SECONDS, 3, live_order)) as live:
        live.start()
        events = tmp_path / "events.jsonl"
        events.write_text(Event(stage="round", number=2, of=3).model_dump_json() + "\n")
        processes._follow(subprocess.Popen(["sleep", str(seconds)]), events, live.step)
        live.end(2)


def test_a_log_gets_lines_while_the_engine_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert progress.LOG_SECONDS + processes.POLL_SECONDS <= 30
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.3)
    # A log that takes colours, as FORCE_COLOR makes it, is still a log.
    log = io.StringIO()
    monkeypatch.setattr(report, "console", Console(file=log, force_terminal=True, highlight=False))
    follow(tmp_path, 1.5)
    *lines, last = log.getvalue().splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("  1/2 stock: round 2 of 3, about ") for line in lines)
    assert last.startswith("  1/2 stock: done in ")
    assert ", 2 rounds of 3 because time is short, about " in last


def test_a_terminal_shows_round_and_time_left_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, its = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(its, "w") as terminal:
        monkeypatch.setattr(report, "console", Console(file=terminal, highlight=False, width=100))
        read = bytearray()

        def drain() -> None:
            with suppress(OSError):  # the end of a terminal is an error
                while data := os.read(ours, 4096):
                    read.extend(data)

        reader = threading.Thread(target=drain)
        reader.start()
        follow(tmp_path, 0.5)
    reader.join()
    os.close(ours)
    shown = read.decode()
    assert "1/2 stock: round 2 of 3, about " in shown
    assert "\x1b[2K" in shown  # the line is drawn again in its place
    assert "1/2 stock: done in " in shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Bench(), "(chosen for this model and machine; "),
        (Bench(input_len=8, rounds=3), "(INPUT_LEN, ROUNDS given, the others chosen for "),
    ],
)
def test_the_first_lines_say_what_is_measured_how_long_it_takes_and_what_changes_it(
    options: Bench, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "console", console := Console(width=300, record=True))
    report.announce(plan(), options, 250.0)
    report.announce(plan(), options, None)
    first, second, _, fourth = console.export_text().splitlines()
    assert "INPUT_LEN=8 OUTPUT_LEN=4 NUM_PROMPTS=3 REPEATS=2 ROUNDS=3" in first
    assert says in first
    assert "set any of them to change it" in first
    assert second.endswith("about 4 min for 4 processes")
    assert fourth.endswith("known after the first of 4 processes")
