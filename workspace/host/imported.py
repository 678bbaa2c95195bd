# SPDX-License-Identifier: Apache-2.0
"""What Python files import, read from their text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def names(path: Path, *, when_imported: bool = False) -> Iterator[str]:
    """The dotted names that a file imports, `package.module.name` for `from package.module import
    name`: anywhere in it, or only what is imported with it."""
    tree = ast.parse(path.read_text())
    for node in tree.body if when_imported else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
