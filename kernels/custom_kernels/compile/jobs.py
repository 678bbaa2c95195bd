# SPDX-License-Identifier: Apache-2.0
"""Limit parallel compile jobs by cores and free memory, over all processes of a user.

There are as many slots as cores. Every compiler holds one, in which it writes how much memory it
may take. Slots are locked files in the user's temporary folder, so builds in two checkouts share
them, and the operating system frees a slot when its holder dies. A compiler starts when a slot is
free and there is memory for it beside what the others may take, or when no other runs.
"""

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

GIB = 2**30
POLL_SECONDS = 0.1


def available() -> int:
    """Bytes of free memory, by the kernel or by the container's limit."""
    meminfo = Path("/proc/meminfo").read_text()
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    free = int(found[1]) * 1024 if found else 2 * GIB
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


def folder() -> Path:
    """The folder of this user's slots.

    Raises:
        OSError: it belongs to another user.
    """
    path = Path(tempfile.gettempdir()) / f"custom-kernels-jobs-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to another user; remove it or set TMPDIR")
    return path


@contextmanager
def slot(
    need: int,
    cores: int | None = None,
    free: Callable[[], int] = available,
) -> Iterator[IO[str]]:
    """Wait for a slot and for ``need`` bytes of memory, and hold both.

    Yields the slot's open file: a compiler that inherits it keeps the slot when its parent is
    killed.
    """
    slots, count = folder(), cores or len(os.sched_getaffinity(0))
    while (taken := _take(slots, count, need, free)) is None:
        time.sleep(POLL_SECONDS)
    with taken:
        yield taken


def _take(slots: Path, count: int, need: int, free: Callable[[], int]) -> IO[str] | None:
    """Lock a slot; None if none is free, or there is not enough memory beside the others."""
    with (slots / "gate").open("w") as gate, ExitStack() as opened:
        fcntl.flock(gate, fcntl.LOCK_EX)
        vacant, promised = None, 0
        for index in range(count):
            file = opened.enter_context((slots / f"slot-{index}").open("a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                vacant = vacant or file
            except BlockingIOError:
                file.seek(0)
                promised += int(file.read() or 0)
        if vacant is None or (promised and free() - promised < need):
            return None
        vacant.truncate(0)
        vacant.write(str(need))
        vacant.flush()
        # All files are closed at the end of the block, except for this duplicate.
        return os.fdopen(os.dup(vacant.fileno()), "a+")
