# SPDX-License-Identifier: Apache-2.0
"""Run one engine process: start it, follow its steps, end it with all its children."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil

from workspace.bench.engine_log import explain
from workspace.bench.messages import EVENTS, JOB, RESULT, EngineJob, Event, Job, Ran, Result
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 10.0
"""For the workers of an engine that has ended to end as well."""

AnyRan = TypeVar("AnyRan", bound=Ran)


def run(
    job: Job,
    environment: dict[str, str],
    log: Path,
    on_step: Callable[[Event | None], None],
    name: str,
) -> Result:
    """Run the job of variant `name` of `make bench`; see `run_program`."""
    return run_program("workspace.bench.engine_run", Result, job, environment, log, on_step, name)


def run_program(
    program: str,
    result: type[AnyRan],
    job: EngineJob,
    environment: dict[str, str],
    log: Path,
    on_step: Callable[[Event | None], None],
    name: str,
) -> AnyRan:
    """Run the job of variant `name` in a new process of the module `program`; what it answers.

    The process leads a new session and is killed with all its workers before this returns or
    raises. `on_step` is called for each step that begins and, with None, several times a second
    in between.

    Raises:
        WorkspaceError: the process failed; the line that says why, and where its log is.
    """
    job.folder.mkdir(parents=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    job_file = job.folder / JOB
    job_file.write_text(job.model_dump_json())
    command = [sys.executable, "-m", program, str(job_file)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _follow(process, job.folder / EVENTS, on_step)
        finally:
            _end(process)
    answer = job.folder / RESULT
    if process.returncode != 0 or not answer.is_file():
        text = log.read_text(errors="replace")
        raise WorkspaceError(f"{name}: {explain(text, process.returncode)}; log: {log}")
    return result.model_validate_json(answer.read_text())


def _follow(
    process: subprocess.Popen[bytes], events: Path, on_step: Callable[[Event | None], None]
) -> None:
    seen = 0
    while True:
        ended = process.poll() is not None
        if events.is_file():
            lines = events.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            for line in whole[seen:]:
                on_step(Event.model_validate_json(line))
            seen = len(whole)
        if ended:
            return
        on_step(None)
        time.sleep(POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    # By process group: psutil's children() misses a worker whose parent has died already.
    if process.poll() == 0:
        # Workers that end by themselves remove their shared memory.
        end = time.monotonic() + PATIENCE_SECONDS
        while _runs(process.pid) and time.monotonic() < end:
            time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _runs(group: int) -> bool:
    """Whether any process of a group has not ended. In a container nobody may collect an orphan
    that has, a zombie."""
    for one in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(one.pid) == group and one.status() != psutil.STATUS_ZOMBIE:
                return True
    return False
