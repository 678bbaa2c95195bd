# SPDX-License-Identifier: Apache-2.0
"""Notice that a kernel was saved: when, and whether a backend's files changed."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path

from custom_kernels import paths
from custom_kernels.inspect import reports
from custom_kernels.operation import Backend


class Saves:
    """The times of saves below the package, from construction until `close`."""

    def __init__(self) -> None:
        self._found: queue.Queue[float] = queue.Queue()
        self._stop, self._watching = threading.Event(), threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()
        self._watching.wait()

    def _follow(self) -> None:
        from watchfiles import DefaultFilter, watch

        # A short step: what an editor writes in two steps is still one save.
        for changes in watch(
            paths.PACKAGE,
            watch_filter=DefaultFilter(ignore_entity_patterns=[r"\.tmp$", r"\.pyc$", r"~$"]),
            step=30,
            debounce=300,
            stop_event=self._stop,
            yield_on_timeout=True,
            rust_timeout=500,
        ):
            self._watching.set()  # at the first time-out at the latest
            if not changes:
                continue
            seen = time.time()
            times = [Path(path).stat().st_mtime for _, path in changes if Path(path).exists()]
            # The clock starts with the save, not when it is noticed; an editor may have kept an
            # older time.
            self._found.put(max([time for time in times if seen - 2 < time <= seen], default=seen))

    def wait(self) -> float:
        """Wait for a save; the time of the latest one since the last call."""
        last = self._found.get()
        while not self._found.empty():
            last = self._found.get()
        return last

    def close(self) -> None:
        self._stop.set()


def fingerprint(backend: Backend) -> str:
    """Hash of a backend's files; empty while one cannot be read, in the middle of a save."""
    try:
        return reports.fingerprint(backend)
    except OSError:
        return ""
