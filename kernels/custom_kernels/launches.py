# SPDX-License-Identifier: Apache-2.0
"""Count kernel launches: they prove which kernel ran, in which layers, and for how many tokens.

Every call of an operation is counted in its process. With ``CUSTOM_KERNELS_LAUNCH_LOG=<folder>`` in
the environment each process also keeps its counts in the memory-mapped file
``<folder>/launches-<pid>``, which is complete however the process ends, SIGKILL included. Replays
of a CUDA graph are not calls and are not counted.

With a log, calls are also counted by layer. A layer's name cannot be an argument of the operation:
it would be part of torch.compile's graph. But the operation sees the weight, and whoever loads the
weights registers which layer has its weight at which address (``layer``).

File layout: records of 256 bytes, each a key in UTF-8 padded with NUL to 248 bytes and a count as a
little-endian unsigned 64-bit integer. A key is ``operation.backend``, or with a space between them
``operation.backend layer``; that a layer exists is a record whose key is a space and its name.
``operation.backend<=64`` has the calls with so many tokens, by ``buckets``. The first record
without a key ends the file.
"""

import functools
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from custom_kernels.buckets import bucket

ENVIRONMENT = "CUSTOM_KERNELS_LAUNCH_LOG"

_KEY_BYTES = 248
_RECORD = struct.Struct(f"<{_KEY_BYTES}sQ")
_WORDS = _RECORD.size // 8
_CAPACITY = 4096
"""Records in the file, which is sparse: it takes no more space than those that are written."""

_lock = threading.Lock()
_counts: dict[tuple[str, str], int] = {}
_layers: dict[int, str] = {}
"""The layers by the addresses of their weights."""
_logged: dict[tuple[str, str, str], list[int]] = {}
"""(operation, backend, the rest of the key) → [index of its count in the file, the count]."""
_file: memoryview | None = None
"""The mapped file as 64-bit words, each of which is stored by a single instruction."""


def record(
    operation: str, backend: str, weight: int | None = None, tokens: int | None = None
) -> None:
    """Count one launch of a backend, also by the layer whose weight is at this address and by the
    number of tokens. Takes about a microsecond, with a log up to four."""
    key = (operation, backend)
    with _lock:
        count = _counts.get(key, 0)
        _counts[key] = count + 1
        if _file is None and (count or not _open_log()):
            return
        _log((operation, backend, ""), 1)
        name = _layers.get(weight) if weight is not None else None
        if name is not None:
            _log((operation, backend, f" {name}"), 1)
        if tokens is not None:
            _log((operation, backend, _up_to(tokens)), 1)


def layer(name: str, weight: int, expected: bool = True) -> None:
    """Register, if there is a log, that the layer ``name`` has its weight at this address.

    Args:
        expected: the layer runs in every forward pass: ``read_layers`` lists it even without calls.
    """
    with _lock:
        if _file is None and not _open_log():
            return
        _layers[weight] = name
        if expected:
            _log(("", "", f" {name}"), 0)


def counts() -> dict[str, int]:
    """Launches of this process so far, for example ``{"gemm.cublaslt": 12}``."""
    with _lock:
        return {f"{operation}.{backend}": n for (operation, backend), n in _counts.items()}


def reset() -> None:
    """Clear this process's counts; a log file keeps its contents and is opened again."""
    global _file
    _counts.clear()
    _layers.clear()
    _logged.clear()
    _file = None


def read(directory: str | os.PathLike[str]) -> dict[int, dict[str, int]]:
    """Counts of every process that launched something: ``{pid: {"gemm.cublaslt": 12}}``."""
    found = {
        pid: {key: count for key, count in records if " " not in key and "<=" not in key}
        for pid, records in _files(directory)
    }
    return {pid: launched for pid, launched in found.items() if launched}


def read_layers(directory: str | os.PathLike[str]) -> dict[int, dict[str, dict[str, int]]]:
    """Counts by layer of every process with layers: ``{pid: {"lm_head": {"gemm.cublaslt": 12}}}``;
    empty for a layer that launched nothing."""
    found: dict[int, dict[str, dict[str, int]]] = {}
    for pid, records in _files(directory):
        layers: dict[str, dict[str, int]] = {}
        for key, count in records:
            kernel, separator, name = key.partition(" ")
            if separator:
                launched = layers.setdefault(name, {})
                if kernel:
                    launched[kernel] = count
        if layers:
            found[pid] = layers
    return found


def read_tokens(directory: str | os.PathLike[str]) -> dict[int, dict[str, dict[int, int]]]:
    """Counts by number of tokens of every process: ``{pid: {"gemm.cublaslt": {64: 12}}}`` for 12
    calls in the bucket of at most 64."""
    found: dict[int, dict[str, dict[int, int]]] = {}
    for pid, records in _files(directory):
        for key, count in records:
            kernel, separator, most = key.partition("<=")
            if separator:
                found.setdefault(pid, {}).setdefault(kernel, {})[int(most)] = count
    return found


def _files(directory: str | os.PathLike[str]) -> Iterator[tuple[int, list[tuple[str, int]]]]:
    for path in sorted(Path(directory).glob("launches-*")):
        yield int(path.name.removeprefix("launches-")), list(_records(path.read_bytes()))


def _records(data: bytes) -> Iterator[tuple[str, int]]:
    for offset in range(0, len(data) - _RECORD.size + 1, _RECORD.size):
        key, count = _RECORD.unpack_from(data, offset)
        if not key[0]:
            return
        yield key.rstrip(b"\0").decode(), count


def _log(name: tuple[str, str, str], more: int) -> None:
    """Add to a count in the file; its key is written before its first count."""
    assert _file is not None
    if name not in _logged:
        operation, backend, rest = name
        key = f"{operation}.{backend}{rest}" if operation else rest
        data = key.encode()
        if len(_logged) >= _CAPACITY or len(data) > _KEY_BYTES:
            raise ValueError(
                f"launch log: {_CAPACITY} names of at most {_KEY_BYTES} bytes fit, "
                f"{key!r} is one too many or too long; shorten the backend's file name"
            )
        start = len(_logged) * _RECORD.size
        _RECORD.pack_into(_file.cast("B"), start, data, 0)
        _logged[name] = [start // 8 + _WORDS - 1, 0]
    entry = _logged[name]
    entry[1] += more
    _file[entry[0]] = entry[1]


@functools.lru_cache(maxsize=1024)
def _up_to(tokens: int) -> str:
    return f"<={bucket(tokens)}"


def _open_log() -> bool:
    """Open the log that the environment names, if it names one."""
    global _file
    directory = os.environ.get(ENVIRONMENT)
    if not directory:
        return False
    Path(directory).mkdir(parents=True, exist_ok=True)
    path = Path(directory) / f"launches-{os.getpid()}"
    with path.open("w+b") as file:  # replaces that of an earlier process with the same pid
        file.truncate(_CAPACITY * _RECORD.size)
        _file = memoryview(mmap.mmap(file.fileno(), _CAPACITY * _RECORD.size)).cast("Q")
    return True


def _after_fork() -> None:
    # A forked child counts in a file of its own.
    global _lock
    _lock = threading.Lock()
    reset()


os.register_at_fork(after_in_child=_after_fork)
