# SPDX-License-Identifier: Apache-2.0
"""The identity of the kernels: what they are made of, and what decides how they run."""

import hashlib
from pathlib import Path

from custom_kernels import paths

TOOLS = frozenset({"compile", "inspect", "check", "bench", "tuning", "profile"})
"""Folders and modules that the run time never imports, except compile/ for a missing library."""


def is_run_time(path: Path) -> bool:
    """Whether a path, relative to the package, is part of what is imported inside vLLM."""
    return path.parts[0].removesuffix(".py") not in TOOLS and path.name != "cases.py"


def source_hash() -> str:
    """sha256 over the names and contents of all sources in this package, for the provenance of a
    result."""
    digest = hashlib.sha256()
    for path in sorted(paths.PACKAGE.rglob("*")):
        if path.suffix in {".py", ".cu", ".cuh"}:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(paths.PACKAGE)}\0{content}\0".encode())
    return digest.hexdigest()
