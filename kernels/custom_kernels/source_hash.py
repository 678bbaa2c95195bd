# SPDX-License-Identifier: Apache-2.0
"""The identity of the kernels: what they are made of, and what decides how they run."""

import hashlib
from pathlib import Path

from custom_kernels import paths

TOOLS = frozenset(
    {"compile", "command", "inspect", "check", "bench", "tuning", "profile", "sanitize"}
)
"""Folders and modules that the run time never imports, except compile/ for a missing library."""

SUFFIXES = frozenset({".py", ".cu", ".cuh", ".json"})


def is_run_time(path: Path) -> bool:
    """Whether a path, relative to the package, is part of what is imported inside vLLM."""
    return path.parts[0].removesuffix(".py") not in TOOLS and path.name != "cases.py"


def files() -> list[Path]:
    """What the kernels are made of, relative to the package, sorted: run-time modules, ``.cu``
    files and headers, the measured choices in this package."""
    found = (path.relative_to(paths.PACKAGE) for path in paths.PACKAGE.rglob("*"))
    return sorted(path for path in found if path.suffix in SUFFIXES and is_run_time(path))


def source_hash() -> str:
    """sha256 over the names and contents of ``files`` and the compiler's flags.

    It is part of a result's provenance and of vLLM's key for compiled graphs: what changes neither
    a kernel nor how it runs (a plot, a table, a case that is measured) leaves it as it is.
    """
    from custom_kernels.compile.build import FLAGS

    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for path in files():
        content = hashlib.sha256((paths.PACKAGE / path).read_bytes()).hexdigest()
        digest.update(f"{path}\0{content}\0".encode())
    return digest.hexdigest()
