# SPDX-License-Identifier: Apache-2.0
"""Count kernel launches, so that a measurement can prove which kernel ran.

Every call of an operation is counted in its process. With ``CUSTOM_KERNELS_LAUNCH_LOG=<folder>`` in
the environment each process also keeps its counts in the memory-mapped file
``<folder>/launches-<pid>``. Those pages belong to the operating system, so the file is right
however the process ends, SIGKILL included. Replays of a CUDA graph are not calls and so
not counted.

File layout: records of 64 bytes, each a name ``operation.backend`` in UTF-8 padded with NUL to 56
bytes and a count as a little-endian unsigned 64-bit integer. The first record without a name ends
the file.
"""

import mmap
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

ENVIRONMENT = "CUSTOM_KERNELS_LAUNCH_LOG"

_RECORD = struct.Struct("<56sQ")
_NAME_BYTES = 56
_WORDS = _RECORD.size // 8
_CAPACITY = 256

_lock = threading.Lock()
_counts: dict[tuple[str, str], int] = {}
_slots: dict[tuple[str, str], int] = {}
_file: memoryview | None = None
"""The mapped file as 64-bit words: one is stored by a single instruction, so no count is torn."""


def record(operation: str, backend: str) -> None:
    """Count one launch of ``operation`` by ``backend``. Costs well under a microsecond."""
    key = (operation, backend)
    with _lock:
        count = _counts.get(key, 0) + 1
        _counts[key] = count
        slot = _slots.get(key)
        if slot is None:
            slot = _new_slot(key)
        if _file is not None:
            _file[slot * _WORDS + _WORDS - 1] = count


def counts() -> dict[str, int]:
    """Launches of this process so far, for example ``{"gemm.cublaslt": 12}``."""
    with _lock:
        return {f"{operation}.{backend}": n for (operation, backend), n in _counts.items()}


def reset() -> None:
    """Forget this process's counts; a log file keeps what it has and is opened anew."""
    global _file
    _counts.clear()
    _slots.clear()
    _file = None


def read(directory: str | os.PathLike[str]) -> dict[int, dict[str, int]]:
    """Counts of every process that launched something: ``{pid: {"gemm.cublaslt": 12}}``."""
    return {
        int(path.name.removeprefix("launches-")): dict(_records(path.read_bytes()))
        for path in sorted(Path(directory).glob("launches-*"))
    }


def _records(data: bytes) -> Iterator[tuple[str, int]]:
    for offset in range(0, len(data) - _RECORD.size + 1, _RECORD.size):
        name, count = _RECORD.unpack_from(data, offset)
        if not name[0]:
            return
        yield name.rstrip(b"\0").decode(), count


def _new_slot(key: tuple[str, str]) -> int:
    """Give ``key`` its record in the file; the name is written before the first count."""
    global _file
    directory = os.environ.get(ENVIRONMENT)
    if directory and _file is None:
        _file = _open(Path(directory))
    slot = _slots[key] = len(_slots)
    if _file is not None:
        name = ".".join(key).encode()
        if slot >= _CAPACITY or len(name) > _NAME_BYTES:
            raise ValueError(
                f"launch log: {_CAPACITY} names of at most {_NAME_BYTES} bytes fit, "
                f"{name.decode()!r} is one too many or too long; shorten the backend's file name"
            )
        _RECORD.pack_into(_file.cast("B"), slot * _RECORD.size, name, 0)
    return slot


def _open(directory: Path) -> memoryview:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"launches-{os.getpid()}"
    with path.open("w+b") as file:  # a file of this name is left by an earlier process of our pid
        file.truncate(_CAPACITY * _RECORD.size)
        return memoryview(mmap.mmap(file.fileno(), _CAPACITY * _RECORD.size)).cast("Q")


def _after_fork() -> None:
    # A forked child counts for itself: the parent's file stays the parent's.
    global _lock
    _lock = threading.Lock()
    reset()


os.register_at_fork(after_in_child=_after_fork)
