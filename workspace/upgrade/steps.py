# SPDX-License-Identifier: Apache-2.0
"""The steps of an upgrade and what came of them, in a file: after a kill none is done again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Literal

from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from workspace.environment.progress import LoggedProgress
from workspace.host.errors import WorkspaceError
from workspace.host.files import write_file
from workspace.host.paths import ROOT, STATE
from workspace.host.settings import EXPORTED

FOLDER = STATE / "upgrade"
Status = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Step:
    """What came of a step: one line, and lines for the report's file."""

    name: str
    status: Status
    detail: str
    more: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass
class Steps:
    """The steps of an upgrade to `target` so far, each written when it ends.

    Args:
        key: what they were done with; those of another key are done again.
    """

    target: str
    key: str = ""
    done: list[Step] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.target}.json"

    def resume(self, key: str) -> None:
        """Take over the steps of a run that was killed, if it had the same key."""
        self.key = key
        if self.path.exists():
            saved = json.loads(self.path.read_text())
            known = {step.name for step in self.done}
            for step in saved["done"] if saved["key"] == key else ():
                if step["name"] not in known:
                    self.done.append(Step(**step | {"more": tuple(step["more"])}))

    def do(self, name: str, action: Callable[[], Step]) -> Step:
        """Do a step, unless a run before did it."""
        if before := next((step for step in self.done if step.name == name), None):
            return before
        start = time.monotonic()
        with _progress(f"vLLM {self.target}: {name}"):
            step = action()
        step = replace(step, seconds=time.monotonic() - start)
        self.done.append(step)
        content = {"key": self.key, "done": [asdict(one) for one in self.done]}
        write_file(self.path, json.dumps(content, indent=1).encode())
        return step

    def end(self) -> None:
        """The next run does them all again."""
        self.path.unlink(missing_ok=True)

    @property
    def passed(self) -> bool:
        """Whether every step was done and none failed."""
        return all(step.status == "ok" for step in self.done)


@contextmanager
def _progress(what: str) -> Iterator[None]:
    columns = (SpinnerColumn(), TextColumn("· {task.description}", markup=False))
    with LoggedProgress(*columns, TimeElapsedColumn()) as bar:
        bar.add_task(what, total=None)
        yield


def verb(target: str, name: str, **variables: str) -> tuple[int, str]:
    """Run a verb with release `target` in a process of its own, its output also in a log.

    Returns:
        Its exit status, and its output.
    """
    dropped = {"VERSION", "DEFAULT", "VLLM_VERSION", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    environment = kept | {EXPORTED["VLLM_VERSION"]: target} | variables
    log = STATE / "logs" / f"upgrade-{target}-{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-E", str(ROOT / "workspace" / "bootstrap.py"), name]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            with _stopped_by_signals():
                status = process.wait()
        except WorkspaceError:
            process.terminate()  # it stops what it started
            process.wait()
            raise
    return status, log.read_text(errors="replace")


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise an error."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise WorkspaceError(
            f"interrupted by {signal.Signals(number).name}; to go on where it was: make upgrade"
        )

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def reason(output: str) -> str:
    """The line of a verb's output that says why it failed: its error, else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1]
