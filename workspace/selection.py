# SPDX-License-Identifier: Apache-2.0
"""What K= selects: kernels by their files, because the package may not be installed yet."""

from __future__ import annotations

from workspace.host.errors import WorkspaceError
from workspace.host.paths import KERNELS, ROOT


def operations() -> list[str]:
    return sorted(path.parent.name for path in KERNELS.glob("custom_kernels/*/reference.py"))


def kernel(k: str) -> tuple[str, str | None]:
    """OPERATION or OPERATION.BACKEND; who uses the backend checks it.

    Raises:
        WorkspaceError: there is no such operation.
    """
    operation, _, backend = k.partition(".")
    if operation not in operations():
        known = ", ".join(operations())
        raise WorkspaceError(f"K={k}: there is no operation {operation!r}; there are: {known}")
    return operation, backend or None


def words(value: str | None) -> list[str]:
    """A list that was written with commas or spaces."""
    return (value or "").replace(",", " ").split()


def pytest_arguments(k: str | None) -> list[str]:
    """For a kernel: its own test file, and what the tests of all operations do with it."""
    if not k:
        return []
    operation, _, backend = k.partition(".")
    if operation in operations():
        own = f"test_{operation} and {backend}" if backend else f"test_{operation}"
        return ["-k", f"({own}) or [{operation}.{backend}"]
    return [k] if (ROOT / k.split("::")[0]).exists() else ["-k", k]
