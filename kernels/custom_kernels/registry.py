# SPDX-License-Identifier: Apache-2.0
"""Which operations and backends exist, which of them can run, and the function that runs one.

Everything is found by looking at the folders, so there is no list to edit:

- an operation is a sub-folder of this package with a ``reference.py``;
- a backend is a file in that folder: ``<backend>.py``, ``<backend>.cu``, or both (``cases.py``,
  which says what to measure, and names with a leading underscore are not backends);
- the operation's ``__init__.py`` declares ``PREFERENCE``, its backends per device type, best first.

A ``<backend>.py`` has ``run(*arguments)``, which returns a tensor or a tuple of tensors, and may
have ``unavailable(device) -> str | None`` with the reason why it cannot run there and ``DTYPES``,
the only ones that it takes. A ``<backend>.cu`` without a Python file exports a function named like
the operation, called with the operation's arguments and the output, or outputs, made by its
``empty_output``.

Triton and CuPy kernels are Python files that import ``triton`` or ``cupy``. Without a GPU, Triton's
run in its interpreter where ``TRITON_INTERPRET=1`` is set before Triton is imported.
"""

import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from custom_kernels import paths

if TYPE_CHECKING:
    import torch

NOT_BACKENDS = frozenset({"__init__", "cases"})
_NOTES = re.compile(
    r"^(?://|#) (architectures|dtypes|spills|no tensor cores|not deterministic): *(.+)$",
    re.MULTILINE,
)
_IMPORTS = re.compile(r"^(?:import|from) (triton|cupy)\b", re.MULTILINE)


class BackendError(RuntimeError):
    """A backend that does not exist or cannot run here. The message is one line with the remedy."""


def operations() -> list[str]:
    """Names of all operations, sorted."""
    return sorted(path.parent.name for path in paths.PACKAGE.glob("*/reference.py"))


def backends(operation: str) -> list[str]:
    """Names of an operation's backends: those it prefers (on any device) first, then the others by
    name."""
    found = backend_files(operation)
    preference = getattr(_operation(operation), "PREFERENCE", {})
    ranked = list(dict.fromkeys(name for names in preference.values() for name in names))
    return [name for name in ranked if name in found] + sorted(found - set(ranked))


def kind(operation: str, backend: str) -> str:
    """What a backend is written in: ``cuda`` (it has a ``.cu``), ``triton``, ``cupy`` or
    ``torch``."""
    folder = paths.PACKAGE / operation
    if (folder / f"{backend}.cu").is_file():
        return "cuda"
    source = folder / f"{backend}.py"
    found = _IMPORTS.search(source.read_text()) if source.is_file() else None
    return found[1] if found else "torch"


def available(operation: str, backend: str, device: "torch.device | str") -> str | None:
    """None if ``backend`` can run ``operation`` on ``device``, else the reason why not. Compiles
    nothing."""
    import torch

    device = torch.device(device)
    if backend not in backend_files(operation):
        return "there is no such backend"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    written_in = kind(operation, backend)
    if device.type != "cuda" and written_in in ("cuda", "cupy"):
        return "it runs on CUDA devices only"
    if device.type != "cuda" and written_in == "triton" and not _interpreting():
        return "without a GPU Triton only runs in its interpreter: set TRITON_INTERPRET=1"
    if written_in == "cuda":
        from custom_kernels.compile import build, sources

        source = sources.find(operation, backend)
        assert source is not None
        reason = build.unavailable(source, sources.architecture(device))
        if reason is not None:
            return reason
    try:
        module = _backend(operation, backend)
    except Exception as error:
        return f"importing it failed: {error!r}"
    unavailable = getattr(module, "unavailable", None)
    return unavailable(device) if unavailable is not None else None


def require(operation: str, backend: str, device: "torch.device") -> None:
    """Raise BackendError, with the reason and what would run instead, unless the backend can run
    there."""
    if available(operation, backend, device) is not None:
        raise BackendError(_explain(operation, backend, device))


def takes(operation: str, backend: str, dtype: "torch.dtype") -> bool:
    """Whether a backend computes in this dtype: all do but those that list theirs, in ``DTYPES`` or
    in a comment ``// dtypes:`` of the ``.cu``."""
    dtypes = getattr(_backend(operation, backend), "DTYPES", None)
    if dtypes is not None:
        return dtype in dtypes
    names = notes(operation, backend).get("dtypes", "").split()
    return not names or str(dtype).removeprefix("torch.") in names


def preferred(operation: str, device: "torch.device") -> str:
    """The first backend that can run, in the order that the operation declares for this type of
    device."""
    for backend in _operation(operation).PREFERENCE.get(device.type, ()):
        if available(operation, backend, device) is None:
            return str(backend)
    raise BackendError(_explain(operation, None, device))


@functools.cache
def best(operation: str, device: "torch.device", dtype: "torch.dtype") -> str:
    """The first backend that can run there and takes ``dtype``, in the operation's order of
    preference."""
    for backend in _operation(operation).PREFERENCE.get(device.type, ()):
        if takes(operation, backend, dtype) and available(operation, backend, device) is None:
            return str(backend)
    raise BackendError(_explain(operation, None, device))


@functools.cache
def runner(
    operation: str, backend: str, device: "torch.device", dtype: "torch.dtype"
) -> Callable[..., Any]:
    """The function that runs ``operation`` with ``backend``; compiles it if need be.

    Raises BackendError if the backend cannot run on ``device`` or does not take ``dtype``.
    """
    require(operation, backend, device)
    if not takes(operation, backend, dtype):
        able = [name for name in backends(operation) if takes(operation, name, dtype)]
        raise BackendError(
            f"{operation}.{backend} does not take {dtype}; these do: {', '.join(able)}"
        )
    module = _backend(operation, backend)
    if module is not None:
        run: Callable[..., Any] = module.run
        return run

    compiled = library(operation, backend, device)[operation]
    empty_output = _operation(operation).empty_output

    def run_compiled(*arguments: Any) -> Any:
        out = empty_output(*arguments)
        compiled(*arguments, *(out if isinstance(out, tuple) else (out,)))
        return out

    return run_compiled


def library(operation: str, backend: str, device: "torch.device") -> Any:
    """The compiled half of a backend, a ``tvm_ffi.Module``; it is compiled first if need be."""
    from custom_kernels.compile import build

    return build.load(operation, backend, device)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _explain(operation: str, backend: str | None, device: "torch.device") -> str:
    reasons = {name: available(operation, name, device) for name in backends(operation)}
    usable = ", ".join(name for name, reason in reasons.items() if reason is None) or "none"
    if backend is None:
        problem = "; ".join(
            f"{name}: {reason}" for name, reason in reasons.items() if reason is not None
        )
        return (
            f"{operation} has no preferred backend that runs on {device} ({problem}); "
            f"available: {usable}"
        )
    reason = reasons.get(backend, "there is no such backend")
    return f"{operation} cannot use backend {backend!r} on {device}: {reason}; available: {usable}"


def _operation(operation: str) -> ModuleType:
    if not (paths.PACKAGE / operation / "reference.py").is_file():
        known = ", ".join(operations())
        raise BackendError(f"there is no operation {operation!r}; there are: {known}")
    return import_module(f"custom_kernels.{operation}")


def _backend(operation: str, backend: str) -> ModuleType | None:
    if not (paths.PACKAGE / operation / f"{backend}.py").is_file():
        return None
    return import_module(f"custom_kernels.{operation}.{backend}")


def backend_files(operation: str) -> set[str]:
    """Names of an operation's backends, by their files alone: imports nothing."""
    folder: Path = paths.PACKAGE / operation
    return {
        path.stem
        for path in folder.glob("*")
        if path.suffix in {".py", ".cu"}
        and not path.stem.startswith("_")
        and path.stem not in NOT_BACKENDS
    }


def notes(operation: str, backend: str) -> dict[str, str]:
    """What the backend's files say of themselves in comments: ``architectures``, ``dtypes``,
    ``spills``, ``no tensor cores``, ``not deterministic``."""
    found: dict[str, str] = {}
    for suffix in (".py", ".cu"):
        path = paths.PACKAGE / operation / f"{backend}{suffix}"
        if path.is_file():
            found.update(_NOTES.findall(path.read_text()))
    return found


def architectures(operation: str, backend: str, wanted: Iterable[str]) -> tuple[str, ...]:
    """Those of ``wanted`` that the backend is written for."""
    only = notes(operation, backend).get("architectures", "").split()
    return tuple(name for name in wanted if not only or name in only)


def is_matrix(operation: str) -> bool:
    """Whether the operation is a matrix product, which tensor cores should do."""
    text = (paths.PACKAGE / operation / "__init__.py").read_text()
    return re.search(r"^MATRIX = True$", text, re.MULTILINE) is not None


def chosen(words: Sequence[str]) -> list[tuple[str, str]]:
    """``gemm`` and ``gemm.triton`` as (operation, backend) with kernels; nothing means everything.

    Raises BackendError for what does not exist.
    """
    found = []
    for word in words or operations():
        operation, _, backend = word.partition(".")
        if operation not in operations():
            known = ", ".join(operations())
            raise BackendError(f"there is no operation {operation!r}; there are: {known}")
        names = backend_files(operation)
        if backend and backend not in names:
            raise BackendError(
                f"{operation} has no backend {backend!r}; there are: {', '.join(sorted(names))}"
            )
        found += [(operation, name) for name in ([backend] if backend else sorted(names))]
    return found
