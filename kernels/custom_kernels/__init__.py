# SPDX-License-Identifier: Apache-2.0
"""Kernels for LLM inference: one folder per operation, one file per backend.

``from custom_kernels import custom_gemm`` finds the operation ``gemm``; the same works for every
operation that has a folder here. Importing this package imports nothing else and compiles nothing.
"""

from importlib import import_module
from typing import Any

_PREFIX = "custom_"


def __getattr__(name: str) -> Any:
    """Resolve ``custom_<operation>`` to the public function in that operation's folder."""
    if name.startswith(_PREFIX) and name.removeprefix(_PREFIX) in _operations():
        return getattr(import_module(f"custom_kernels.{name.removeprefix(_PREFIX)}"), name)
    raise AttributeError(f"module 'custom_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *(_PREFIX + operation for operation in _operations())]


def _operations() -> list[str]:
    return list(map(str, import_module("custom_kernels.registry").operations()))
