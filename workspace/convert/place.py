# SPDX-License-Identifier: Apache-2.0
"""Where a converted model is made, and how it gets to OUT: whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workspace.convert.report import NAME
from workspace.host.errors import WorkspaceError
from workspace.host.files import PARTIAL


def check(out: Path, source: Path, *, force: bool) -> None:
    """Raise unless `out` may be written: it is free, or a model that FORCE=1 lets us replace."""
    if not out.exists() and (replaced := _replaced(out)).exists():
        replaced.rename(out)  # killed between the two renames of `put`
    if out.is_relative_to(source) or source.is_relative_to(out):
        raise WorkspaceError(f"OUT={out} and MODEL={source} lie in each other; name another folder")
    if not out.exists():
        return
    if not force:
        raise WorkspaceError(f"OUT={out} exists; FORCE=1 replaces it when the new one is complete")
    if not (out / "config.json").is_file():
        raise WorkspaceError(f"OUT={out} is not a model, so FORCE=1 does not replace it")


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """The folder beside `out` in which it is made. It stays if the process dies.

    Raises:
        WorkspaceError: another process writes it, or it is not of ours.
    """
    folder = out.with_name(f"{out.name}.unfinished")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkspaceError(f"another make convert is writing {folder}; wait for it") from None
        left = {path.name for path in folder.iterdir() if not path.name.startswith(PARTIAL)}
        if left and NAME not in left:
            raise WorkspaceError(
                f"{folder} has files that make convert did not write; move it away"
            )
        yield folder
    finally:
        os.close(descriptor)


def put(folder: Path, out: Path) -> None:
    """Rename the finished folder to `out`; remove what was there."""
    replaced = _replaced(out)
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    folder.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def check_space(folder: Path, needed: int) -> None:
    """Raise if so many bytes do not fit."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WorkspaceError(
            f"the converted weights take {needed / 1e9:.1f} GB, and {folder} has "
            f"{free / 1e9:.1f} GB free; free some space or name another OUT"
        )


def _replaced(out: Path) -> Path:
    return out.with_name(f"{PARTIAL}{out.name}-replaced")
