# SPDX-License-Identifier: Apache-2.0
"""The files of a released wheel, compressed better than the wheel does it.

Of vLLM 0.25.1's CUDA wheel that saves 63 of 250 MB, for four minutes of one core; the result is
kept beside the wheel, so it is made once. Names and contents of the files are the wheel's, CRC by
CRC, and `make dev` takes them out of it as out of the wheel.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from workspace.host.text import say


def recompressed(wheel: Path) -> Path:
    """The file in the cache, made if it is not there."""
    target = wheel.with_name(f"{wheel.name}.lzma")
    if target.exists():
        return target
    say(f"compressing the files of {wheel.name} once more, for this and later bundles")
    handle, name = tempfile.mkstemp(dir=wheel.parent, prefix="partial-")
    os.close(handle)
    partial = Path(name)
    columns = (TextColumn("· {task.percentage:3.0f} %"), BarColumn(), TimeRemainingColumn())
    try:
        with (
            zipfile.ZipFile(wheel) as source,
            zipfile.ZipFile(partial, "w", zipfile.ZIP_LZMA) as sink,
            Progress(*columns, transient=True) as bar,
        ):
            members = [member for member in source.infolist() if not member.is_dir()]
            task = bar.add_task("", total=sum(member.file_size for member in members))
            for member in members:
                entry = zipfile.ZipInfo(member.filename, member.date_time)
                entry.external_attr, entry.compress_type = member.external_attr, zipfile.ZIP_LZMA
                with source.open(member) as content, sink.open(entry, "w") as copy:
                    while chunk := content.read(1 << 20):
                        copy.write(chunk)
                        bar.advance(task, len(chunk))
        _require_same(wheel, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _require_same(wheel: Path, copy: Path) -> None:
    def files(path: Path) -> dict[str, tuple[int, int]]:
        with zipfile.ZipFile(path) as archive:
            return {m.filename: (m.CRC, m.file_size) for m in archive.infolist() if not m.is_dir()}

    if files(wheel) != files(copy):
        raise AssertionError(f"{copy} does not hold the files of {wheel}")
