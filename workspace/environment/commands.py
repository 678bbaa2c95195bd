# SPDX-License-Identifier: Apache-2.0
"""Run a command that must succeed; if it fails, the error is one line with the reason."""

from __future__ import annotations

import os
import subprocess
import sys

from workspace.environment import index
from workspace.host import setup_lock
from workspace.host.errors import WorkspaceError
from workspace.host.text import last_line

INDEX_REMEDY = (
    "check the network and free disk space, or point UV_DEFAULT_INDEX (or pip's index-url) to "
    "another index, then re-run"
)


def run(
    command: list[str],
    *,
    env: dict[str, str] | None = None,
    cwd: str | None = None,
    quiet: bool = False,
    failure: str = "",
) -> str:
    """Run a command; its output if `quiet`, else the output goes to standard error.

    The set-up lock is passed on: if this process is killed and the command continues, the next run
    waits for it instead of writing to the same files.

    Raises:
        WorkspaceError: it failed. The message is `failure` (what could not be done and what to do
            about it) and, if `quiet`, the last line of the command's error output.
    """
    result = subprocess.run(
        command,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        stdout=subprocess.PIPE if quiet else sys.stderr,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
        pass_fds=setup_lock.held(),
        check=False,
    )
    if result.returncode:
        what = failure or f"{' '.join(command[:4])} … failed with status {result.returncode}"
        reason = f": {index.redact(last_line(result.stderr))}" if result.stderr else ""
        raise WorkspaceError(what + reason)
    return result.stdout or ""
