# SPDX-License-Identifier: Apache-2.0
"""Run cmake with a progress bar on a terminal, plain lines elsewhere, and all output in a log.

Of a failure, cmake's first error is printed, or the first failed step with the compiler's messages.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from itertools import takewhile
from pathlib import Path
from typing import IO

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from workspace.environment.progress import LoggedProgress
from workspace.fork import time_left
from workspace.fork.time_left import STATUS, STEP
from workspace.host import setup_lock
from workspace.host.errors import WorkspaceError

SHOWN_LINES = 60
FULL = 16 * 2**20
"""A disk with fewer free bytes is full."""
CMAKE_ENDS = ("-- ", "Call Stack", "CMake Error", "CMake Warning")


def first_error(log: str) -> str:
    """The first failure in a log, without the command lines that ninja and cmake print with it."""
    lines = log.splitlines()
    for start, line in enumerate(lines):
        if line.startswith("FAILED: "):
            # ninja: FAILED: …, the command, the output of the command, then ninja's next line.
            block = takewhile(lambda text: not _ninja(text), lines[start + 2 :])
        elif line.startswith("CMake Error"):
            block = takewhile(lambda text: not text.startswith(CMAKE_ENDS), lines[start + 1 :])
        else:
            continue
        return "\n".join([line, *block][:SHOWN_LINES]).rstrip()
    return "\n".join(lines[-SHOWN_LINES:])


def _ninja(line: str) -> bool:
    return bool(STEP.match(line)) or line.startswith("ninja: ")


def remedy(text: str, folder: Path) -> str:
    """What to do about a failure caused by the machine, else empty.

    Not every tool reports a full disk: cmake reports errors in its own truncated files.
    """
    for written in (folder, Path(tempfile.gettempdir())):
        if shutil.disk_usage(written).free < FULL:
            return f"the disk that holds {written} is full; free some space and re-run"
    if "No space left on device" in text:
        return "a disk is full; free some space and re-run"
    if re.search(r"\bKilled\b|out of memory|cannot allocate memory", text, re.IGNORECASE):
        return "a compiler ran out of memory; re-run with fewer parallel compile jobs: JOBS=1"
    return ""


def run(
    command: list[str],
    *,
    what: str,
    folder: Path,
    log: Path,
    env: dict[str, str],
    jobs: int = 0,
) -> None:
    """Run a build command (`what`, for messages) that writes to `folder`, and append its output to
    `log`; with `jobs`, ninja's parallel ones, show its steps as they finish, and the time left.

    The set-up lock is passed on: if this process is killed and the build continues, the next run
    waits for it.

    Raises:
        WorkspaceError: it failed; its first error was printed.
    """
    steps = time_left.planned(command, env) if jobs else set()
    # By lines: the log is read while the build runs, and what was done before a kill is in it.
    with log.open("a+", buffering=1, errors="replace") as file:
        began = file.tell()
        file.write("$ " + shlex.join(command) + "\n")
        file.flush()
        process = subprocess.Popen(
            command,
            env={**env, **STATUS},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=setup_lock.held(),
        )
        assert process.stdout is not None
        try:
            if jobs:
                _show_steps(process.stdout, file, folder, steps, jobs)
            else:
                file.writelines(process.stdout)
        except BaseException:
            # Ctrl-C reaches the build, too; any other exception must end it.
            process.terminate()
            raise
        finally:
            status = process.wait()
        file.flush()
        file.seek(began)
        text = file.read()
    if status:
        error = first_error(text)
        print(error, file=sys.stderr)
        hint = remedy(error, folder)
        raise WorkspaceError(f"{what} failed{': ' + hint if hint else ' (above)'}; log: {log}")


def _show_steps(output: IO[str], log: IO[str], folder: Path, steps: set[str], jobs: int) -> None:
    def fixed() -> Column:
        return Column(no_wrap=True, min_width=7)  # in a narrow terminal the name gives way

    columns = (
        BarColumn(bar_width=16),
        MofNCompleteColumn(table_column=fixed()),
        TimeElapsedColumn(table_column=fixed()),
        TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True, min_width=20)),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
    )
    remaining = set(steps)

    def left() -> str:
        return time_left.left(remaining, time_left.durations(folder), jobs)

    with LoggedProgress(*columns, transient=False) as progress:
        task = progress.add_task("", total=len(steps) or None, left=left())
        for line in output:
            log.write(line)
            if step := STEP.match(line):
                done, total, made = int(step[1]), int(step[2]), step[3].split()[-1]
                remaining.discard(made)
                name = Path(made).name.removesuffix(".o")
                progress.update(task, completed=done, total=total, description=name, left=left())
                if not progress.redraws:
                    print(line.rstrip(), file=sys.stderr, flush=True)
