# SPDX-License-Identifier: Apache-2.0
"""One stream cut into files of at most a given size, each with its hash.

`unbundle.Joined` reads them as one stream again.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path

from workspace.bundle.unbundle import heading
from workspace.host.errors import WorkspaceError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
LEAST = 1000
"""Bytes: a part is more than its heading, and there are fewer than ten thousand."""


def size(text: str) -> int:
    """PARTS= in bytes: a number with K, M or G."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    number = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if number < LEAST:
        raise WorkspaceError(f"PARTS={text} is no size; give e.g. PARTS=60M or PARTS=2G")
    return number


class Parts(io.RawIOBase):
    """Writes what it is given to `part-0001`, `part-0002`, … in `folder`.

    How many there will be is known beforehand (`total` bytes), because each says so in its heading.
    """

    def __init__(self, folder: Path, identity: str, total: int, limit: int) -> None:
        self._folder, self._identity = folder, identity
        self._room = limit - len(heading(identity, 1, 1))
        self._count = max(1, -(-total // self._room))
        if self._count > 9999:
            raise WorkspaceError(f"that would be {self._count} parts; give larger ones: PARTS=")
        self._left = 0
        self._file: io.BufferedWriter | None = None
        self._digest = hashlib.sha256()
        self.made: list[dict[str, str | int]] = []

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            if not self._left:
                self._next()
            chunk = view[written : written + self._left]
            self._put(chunk)
            self._left -= len(chunk)
            written += len(chunk)
        return written

    def _put(self, chunk: bytes | memoryview) -> None:
        assert self._file is not None
        self._file.write(chunk)
        self._digest.update(chunk)

    def _next(self) -> None:
        self._end()
        number = len(self.made) + 1
        path = self._folder / f"part-{number:04d}"
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self._left = self._room
        self.made.append({"name": path.name})
        self._put(heading(self._identity, number, self._count))

    def _end(self) -> None:
        if self._file is None:
            return
        self.made[-1] |= {"size": self._file.tell(), "sha256": self._digest.hexdigest()}
        self._file.close()
        self._file = None

    def finish(self) -> list[dict[str, str | int]]:
        """Close the last part; name, size and hash of each."""
        if not self.made:
            self._next()
        self._end()
        if len(self.made) != self._count:
            raise AssertionError(f"{len(self.made)} parts were written, {self._count} announced")
        return self.made
