# SPDX-License-Identifier: Apache-2.0
"""The identity of this package's sources, for the provenance of a result."""

import hashlib

from custom_kernels import paths


def source_hash() -> str:
    """sha256 over the names and contents of all sources in this package, for the provenance of a
    result."""
    digest = hashlib.sha256()
    for path in sorted(paths.PACKAGE.rglob("*")):
        if path.suffix in {".py", ".cu", ".cuh"}:
            digest.update(
                f"{path.relative_to(paths.PACKAGE)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode()
            )
    return digest.hexdigest()
