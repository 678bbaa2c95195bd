# SPDX-License-Identifier: Apache-2.0
"""Progress in a log: plain lines. On a terminal: tests of the build and of the benchmark."""

import io
import time

import pytest
from rich.console import Console

from workspace.environment import progress


def test_a_log_gets_a_plain_line_now_and_then_and_nothing_after_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = io.StringIO()
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.2)
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=log, force_terminal=True))
    with progress.bytes_progress() as bar:
        task = bar.add_task("fetching [a] file", total=4_000_000)
        bar.advance(task, 1_000_000)
        while len(log.getvalue().splitlines()) < 2:
            time.sleep(0.05)
    written = log.getvalue()
    assert written.splitlines()[0].startswith("· fetching [a] file 1.0/4.0 MB ")
    assert "\x1b" not in written
    time.sleep(0.5)
    assert log.getvalue() == written
