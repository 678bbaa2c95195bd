# SPDX-License-Identifier: Apache-2.0
"""Which files of the kernels' package a wheel holds: all that runs, perhaps of some operations."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from custom_kernels import paths, registry, source_hash

from workspace.host import imported
from workspace.host.errors import WorkspaceError

PACKAGE = "custom_kernels"


def operations(asked: str | None) -> list[str]:
    """OPS= as a sorted list, with the operations that these need; all if none is given.

    Raises:
        WorkspaceError: one does not exist.
    """
    known = list(map(str, registry.operations()))
    wanted = (asked or "").replace(",", " ").split() or known
    for name in wanted:
        if name not in known:
            raise WorkspaceError(f"OPS={name}: no such operation; use {', '.join(known)}")
    found: set[str] = set()
    while wanted:
        found |= set(wanted)
        needed = {other for name in wanted for other in _needed_by(name) if other in known}
        wanted = sorted(needed - found)
    return sorted(found)


def _needed_by(operation: str) -> Iterator[str]:
    for path in (paths.PACKAGE / operation).glob("*.py"):
        if source_hash.is_run_time(path.relative_to(paths.PACKAGE)):
            for name in _imports(path, when_imported=False):
                yield name.partition(".")[0]


def files(chosen: Collection[str]) -> list[Path]:
    """What is imported inside vLLM, and what compiles a kernel for a GPU that the wheel has no
    library for; relative to the package, sorted. A way into vLLM for an operation that is not
    chosen is left out."""
    others = {str(one) for one in registry.operations()} - set(chosen)
    found = {
        path
        for path in (one.relative_to(paths.PACKAGE) for one in paths.PACKAGE.rglob("*"))
        if (path.suffix in source_hash.SUFFIXES or path.name == "py.typed")
        and (source_hash.is_run_time(path) or path.parts[0] == "compile")
        and path.parts[0] not in others
    }
    absent = set(others)
    while more := {path for path in found if path.suffix == ".py" and _needs(path, absent)}:
        found -= more
        absent |= {_module(path) for path in more}
    return sorted(found)


def _needs(path: Path, absent: Collection[str]) -> bool:
    """Whether importing a file imports one of these modules."""
    return any(
        name == other or name.startswith(f"{other}.")
        for name in _imports(paths.PACKAGE / path, when_imported=True)
        for other in absent
    )


def _imports(path: Path, *, when_imported: bool) -> Iterator[str]:
    """Modules of the package that a file imports, without the package's name."""
    for name in imported.names(path, when_imported=when_imported):
        package, _, rest = name.partition(".")
        if package == PACKAGE and rest:
            yield rest


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")
