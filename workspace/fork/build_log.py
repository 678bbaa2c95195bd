# SPDX-License-Identifier: Apache-2.0
"""Run cmake and show its progress: a bar on a terminal, plain lines elsewhere; all output in a log.

An error is shown as the tool wrote it: cmake's first one, or the first failed step with the
compiler's messages. The log has the rest.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from workspace.environment.progress import LoggedProgress
from workspace.host import setup_lock
from workspace.host.errors import WorkspaceError

STEP = re.compile(r"^\[(\d+)/(\d+)\] (.+)$")
"""ninja's line for a finished step, as NINJA_STATUS below sets it."""
SHOWN_LINES = 60
FULL = 16 * 2**20
"""Bytes; a disk with fewer free ones is full."""


def first_error(log: str) -> str:
    """The first failure in a log, without the command lines that ninja and cmake print with it."""
    lines = log.splitlines()
    for start, line in enumerate(lines):
        if line.startswith("FAILED: "):
            # ninja: FAILED: …, the command, what the command wrote, then its next own line.
            block = lines[start + 2 :]
            ends = (i for i, text in enumerate(block) if STEP.match(text) or text[:7] == "ninja: ")
            return "\n".join([line, *block[: next(ends, len(block))]][:SHOWN_LINES])
        if line.startswith("CMake Error"):
            block = lines[start:]
            ends = (
                i
                for i, text in enumerate(block[1:], 1)
                if text.startswith(("-- ", "Call Stack", "CMake Error", "CMake Warning"))
            )
            return "\n".join(block[: next(ends, len(block))][:SHOWN_LINES]).rstrip()
    return "\n".join(lines[-SHOWN_LINES:])


def why(text: str, folder: Path) -> str:
    """What to do about a failure caused by the machine, else empty.

    Not every tool reports a full disk: cmake complains about its own truncated files.
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
    show_steps: bool = False,
) -> None:
    """Run `command`, which writes to `folder`, and append its output to `log`; with `show_steps`,
    show ninja's steps as they finish.

    The set-up lock is passed on: if this process is killed and the build lives on, the next run
    waits for it.

    Raises:
        WorkspaceError: it failed; its first error is printed before.
    """
    with log.open("a+", errors="replace") as file:
        began = file.tell()
        file.write("$ " + shlex.join(command) + "\n")
        file.flush()
        process = subprocess.Popen(
            command,
            env={**env, "NINJA_STATUS": "[%f/%t] "},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=setup_lock.held(),
        )
        assert process.stdout is not None
        try:
            _follow(process.stdout, file, show_steps=show_steps)
        except BaseException:
            # Ctrl-C reaches the build, too; anything else that ends this process must end it.
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
        remedy = why(error, folder)
        raise WorkspaceError(f"{what} failed{': ' + remedy if remedy else ' (above)'}; log: {log}")


def _follow(output: IO[str], log: IO[str], *, show_steps: bool) -> None:
    if not show_steps:
        log.writelines(output)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    description = TextColumn("{task.description}", markup=False)
    with LoggedProgress(*columns, description, transient=False) as progress:
        task = progress.add_task("", total=None)
        for line in output:
            log.write(line)
            if step := STEP.match(line):
                done, total, text = step.groups()
                progress.update(task, completed=int(done), total=int(total), description=text[-60:])
                if not progress.redraws:
                    print(line.rstrip(), file=sys.stderr, flush=True)
