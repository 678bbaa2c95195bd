# SPDX-License-Identifier: Apache-2.0
"""Run a command that must succeed, and say in one line why it did not."""

from __future__ import annotations

import os
import subprocess
import sys

from workspace.environment import index
from workspace.host import setup_lock
from workspace.host.errors import WorkspaceError

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
    """Run a command that must succeed.

    `failure` says in one line what could not be done and what to do about it; the error ends with
    the command's last line of complaint, unless that was shown already (not `quiet`).

    The set-up lock is passed on: where this process is killed and the command lives on, the
    next run waits for it instead of writing to the same files.
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
        complaint = [line for line in (result.stderr or "").splitlines() if line.strip()]
        reason = complaint[-1].strip() if complaint else f"exit status {result.returncode}"
        what = failure or f"{' '.join(command[:4])} … failed"
        raise WorkspaceError(f"{what}: {index.hide(reason)}" if complaint or not failure else what)
    return result.stdout or ""
