# SPDX-License-Identifier: Apache-2.0
"""Which operations and backends exist. They are found by their files, so there is no list to edit;
``operation.py`` says what makes one."""

import functools
from collections.abc import Sequence

from custom_kernels import paths
from custom_kernels.operation import Backend, BackendError, Operation

__all__ = ["Backend", "BackendError", "Operation", "compiled", "operation", "operations", "select"]


def operations() -> list[Operation]:
    """All operations, sorted by name."""
    names = sorted(path.parent.name for path in paths.PACKAGE.glob("*/reference.py"))
    return [_operation(name) for name in names]


def operation(name: str) -> Operation:
    """The operation of this name, always the same object. Raises BackendError if there is none."""
    if not (paths.PACKAGE / name / "reference.py").is_file():
        known = ", ".join(map(str, operations()))
        raise BackendError(f"there is no operation {name!r}; there are: {known}")
    return _operation(name)


_operation = functools.cache(Operation)


def compiled() -> list[Backend]:
    """All backends with a ``.cu``, sorted by name: imports nothing."""
    return [backend for backend in select([]) if backend.kind == "cuda"]


def select(words: Sequence[str]) -> list[Backend]:
    """``gemm`` is all backends of an operation, ``gemm.triton`` is one; nothing means everything.

    Raises BackendError for what does not exist.
    """
    found = []
    for word in words or map(str, operations()):
        name, _, backend = word.partition(".")
        names = operation(name).backend_names()
        if backend and backend not in names:
            raise BackendError(f"{name} has no backend {backend!r}; there are: {', '.join(names)}")
        found += [operation(name).backend(one) for one in ([backend] if backend else names)]
    return found
