# SPDX-License-Identifier: Apache-2.0
"""One set-up at a time in a checkout."""

from __future__ import annotations

import fcntl
import os

from workspace.host.paths import ROOT, STATE
from workspace.host.text import say

VARIABLE = "WORKSPACE_LOCK_FD"


def take(verb: str) -> None:
    """Acquire the set-up lock of the checkout; the verb releases it when its set-up is done.

    The lock belongs to the open file, so it ends with the last process that has it open.
    """
    STATE.mkdir(exist_ok=True)
    descriptor = os.open(STATE / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        say(f"waiting: another make holds this checkout ({holder or 'unknown'})")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if os.geteuid() == 0:  # under sudo: the owner of the checkout must be able to take it next
        os.fchown(descriptor, ROOT.stat().st_uid, ROOT.stat().st_gid)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"make {verb}, process {os.getpid()}".encode(), 0)
    os.set_inheritable(descriptor, True)
    os.environ[VARIABLE] = str(descriptor)


def held() -> tuple[int, ...]:
    """`pass_fds` for a program that changes files: if this process is killed and that program
    continues, the next run waits for it."""
    descriptor = os.environ.get(VARIABLE)
    return (int(descriptor),) if descriptor else ()


def release() -> None:
    """Set-up is done: another make may start."""
    for descriptor in held():
        os.close(descriptor)
    os.environ.pop(VARIABLE, None)
