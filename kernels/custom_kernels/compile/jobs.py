# SPDX-License-Identifier: Apache-2.0
"""Limit parallel compile jobs by cores and free memory, over all processes of a user.

Every compiler holds one of as many slots as the machine has cores, and says in it how much memory
it may take. The slots are locked files in the user's own folder for temporary files, so two builds
in two checkouts share them, and the operating system frees a slot when its holder dies. A compiler
starts when there is a slot and memory for it beside all that the others may take, or when no other
runs.
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
    """Bytes of memory that can be had now: what the kernel says, or less where a container is
    limited."""
    meminfo = Path("/proc/meminfo").read_text()
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    free = int(found[1]) * 1024 if found else 2 * GIB
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


def folder() -> Path:
    """Where the slots of this user are.

    Raises:
        OSError: somebody else has put something there.
    """
    place = Path(tempfile.gettempdir()) / f"custom-kernels-jobs-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    if place.is_symlink() or place.stat().st_uid != os.getuid():
        raise PermissionError(f"{place} belongs to another user; remove it or set TMPDIR")
    return place


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
    place, number = folder(), cores or len(os.sched_getaffinity(0))
    while (taken := _take(place, number, need, free)) is None:
        time.sleep(POLL_SECONDS)
    with taken:
        yield taken


def _take(place: Path, number: int, need: int, free: Callable[[], int]) -> IO[str] | None:
    """A slot, locked; None where there is none, or not enough memory beside the running."""
    with (place / "gate").open("w") as gate, ExitStack() as looked_at:
        fcntl.flock(gate, fcntl.LOCK_EX)
        vacant, promised = None, 0
        for index in range(number):
            file = looked_at.enter_context((place / f"slot-{index}").open("a+"))
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
        # Everything that was looked at is closed, this one is kept.
        return os.fdopen(os.dup(vacant.fileno()), "a+")
