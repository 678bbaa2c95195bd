# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: a file or folder is complete or absent, whenever the process dies."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workspace.host.errors import WorkspaceError

PARTIAL = ".partial-"
"""Prefix of unfinished files and folders."""
GENERATED = "# Written by the workspace."
"""First words of a generated file whose place may hold one of the user's."""


def write_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write `content` beside `path`, then rename it into place.

    Raises:
        WorkspaceError: the folder is read-only or the disk is full; nothing is left behind.
    """
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL)
        partial = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(mode)  # mkstemp's 0600 would hide a shared record from others
        partial.replace(path)
    except OSError as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise WorkspaceError(_cannot_write(path, error)) from error


def generated(path: Path) -> bool:
    """Whether the file is there and was generated."""
    return path.is_file() and path.read_text(errors="replace").startswith(GENERATED)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `path` when the block ends without an error.

    Raises:
        WorkspaceError: the parent is read-only or the disk is full; nothing is left behind.
    """
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=PARTIAL))
        yield partial
        partial.chmod(0o755)
        if path.exists():  # made by another run meanwhile, from the same inputs
            shutil.rmtree(partial)
        else:
            partial.rename(path)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        # A closed pipe concerns our output, not the folder.
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise WorkspaceError(_cannot_write(path, error)) from error
        raise


def require_writable(folder: Path) -> None:
    """Raise if nothing can be written there, for programs that do not say so.

    Raises:
        WorkspaceError: the folder is read-only or the disk is full.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            file.flush()
    except OSError as error:
        raise WorkspaceError(_cannot_write(folder, error)) from error


def remove_partial(folder: Path) -> None:
    """Remove what a killed run left in `folder`, into which no other run may be writing."""
    for left in folder.glob(f"{PARTIAL}*") if folder.is_dir() else ():
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"cannot write {path}: {reason}; free some space or make it writable, then re-run"
