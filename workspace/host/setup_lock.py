# SPDX-License-Identifier: Apache-2.0
"""One set-up at a time in a checkout."""

from __future__ import annotations

import fcntl
import os

from workspace.host.paths import ROOT, STATE
from workspace.host.text import say

VARIABLE = "WORKSPACE_LOCK_FD"


def take(verb: str) -> None:
    """Acquire the checkout's set-up lock; the verb releases it when its set-up is done.

    The lock belongs to the open file, so it ends with the last process that holds it, however
    that process ends.
    """
    STATE.mkdir(exist_ok=True)
    descriptor = os.open(STATE / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        say(f"waiting: another make holds this checkout ({holder or 'unknown'})")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if os.geteuid() == 0:  # under sudo it stays the owner's, who takes it next
        os.fchown(descriptor, ROOT.stat().st_uid, ROOT.stat().st_gid)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"make {verb}, process {os.getpid()}".encode(), 0)
    os.set_inheritable(descriptor, True)
    os.environ[VARIABLE] = str(descriptor)


def held() -> tuple[int, ...]:
    """What a program that changes files is started with (`pass_fds`): where this process is killed
    and that program lives on, the next run waits for it."""
    descriptor = os.environ.get(VARIABLE)
    return (int(descriptor),) if descriptor else ()


def release() -> None:
    """Set-up is done: another make may start its own."""
    for descriptor in held():
        os.close(descriptor)
    os.environ.pop(VARIABLE, None)
