# SPDX-License-Identifier: Apache-2.0
"""Around a benchmark: one at a time, signals stop the engine, disk errors become one line."""

import errno
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from workspace.host.errors import WorkspaceError
from workspace.host.paths import STATE


@contextmanager
def only_bench(lock: Path) -> Iterator[None]:
    """Hold `lock`; the system releases it however this process ends.

    Raises:
        WorkspaceError: another benchmark holds it, whose figures this would disturb.
    """
    # Not filelock: a contender has to read who the holder is, which would need a second file.
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise WorkspaceError(
                f"another bench is running in this checkout (process {holder}) and each would "
                "disturb the other's figures; re-run when it has ended"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def disk_errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise WorkspaceError(
            f"cannot write {error.filename or STATE}: {error.strerror}; "
            "free some space or make the folder writable, then re-run"
        ) from error


@contextmanager
def signals_stop_engine() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into an exception, on which `processes.run` kills the engine."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, stop) if main_thread else None
    try:
        yield
    except KeyboardInterrupt:
        raise WorkspaceError(
            "interrupted; the engine was stopped and nothing was recorded"
        ) from None
    finally:
        if main_thread:
            with suppress(TypeError):
                signal.signal(signal.SIGTERM, previous)
