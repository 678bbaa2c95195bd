# SPDX-License-Identifier: Apache-2.0
"""An operation and its backends: their files, where they can run, and the function that runs.

- An operation is a folder of this package with a ``reference.py``. Its ``__init__.py`` declares
  ``BACKEND_PRIORITY``, its backends per device type, best first, and ``empty_output``;
  ``USES_TENSOR_CORES = True`` says that its kernels should.
- A backend is a file in that folder: ``<backend>.py``, ``<backend>.cu``, or both (``cases.py``,
  which says what is checked and measured, and names with a leading underscore are not backends).

A ``<backend>.py`` has ``run(*arguments)``, which returns a tensor or a tuple of tensors, and may
have ``DTYPES``, the only ones that it supports, ``MIN_CAPABILITY``, the lowest compute capability
of a GPU that it runs on, and ``unavailable_reason(device) -> str | None``, why it cannot run there.
A ``<backend>.cu`` without a Python file exports a function named like the operation, called with
the operation's arguments and the output, or outputs, of ``empty_output``.

Triton and CuPy kernels are Python files that import ``triton`` or ``cupy``. Without a GPU, Triton's
run in its interpreter where ``TRITON_INTERPRET=1`` is set before Triton is imported.
"""

import functools
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from custom_kernels import paths

if TYPE_CHECKING:
    import torch

NOT_BACKENDS = frozenset({"__init__", "cases"})
_IMPORTS = re.compile(r"^(?:import|from) (triton|cupy)\b", re.MULTILINE)
_NOTES = re.compile(
    r"^(?://|#) "
    r"(link|include|architectures|dtypes|spills|no tensor cores|not deterministic): *(.+)$",
    re.MULTILINE,
)


class BackendError(RuntimeError):
    """An operation or backend that does not exist or cannot run here. The message is one line with
    the remedy."""


def read_notes(path: Path) -> dict[str, str]:
    """Name → value of a file's notes: comments such as ``// architectures: 9.0a`` (in a ``.py``
    with ``#``)."""
    found: dict[str, str] = {}
    for name, value in _NOTES.findall(path.read_text()):
        found[name] = f"{found[name]} {value}" if name in found else value
    return found


class Operation:
    """What is computed. ``registry.operation`` makes one per name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._backends: dict[str, Backend] = {}
        # Every call of an operation looks here.
        self.runner = functools.cache(self._runner)
        self.best = functools.cache(self._best)

    def __str__(self) -> str:
        return self.name

    @property
    def folder(self) -> Path:
        return paths.PACKAGE / self.name

    @property
    def module(self) -> ModuleType:
        return import_module(f"custom_kernels.{self.name}")

    @property
    def function(self) -> Callable[..., Any]:
        """The public one, ``custom_<name>``."""
        function: Callable[..., Any] = getattr(self.module, f"custom_{self.name}")
        return function

    @property
    def reference(self) -> ModuleType:
        """``exact``, which defines the result, and ``run`` in plain torch."""
        return import_module(f"custom_kernels.{self.name}.reference")

    @property
    def cases(self) -> ModuleType:
        """What is checked and measured. Raises BackendError if there is no ``cases.py``."""
        if not (self.folder / "cases.py").is_file():
            raise BackendError(f"{self} has no cases.py, which says what is checked and measured")
        return import_module(f"custom_kernels.{self.name}.cases")

    @property
    def uses_tensor_cores(self) -> bool:
        """What ``USES_TENSOR_CORES`` declares; imports nothing."""
        text = (self.folder / "__init__.py").read_text()
        return re.search(r"^USES_TENSOR_CORES = True$", text, re.MULTILINE) is not None

    def priority(self, device_type: str) -> tuple[str, ...]:
        """Names of the backends for a type of device, best first."""
        return tuple(getattr(self.module, "BACKEND_PRIORITY", {}).get(device_type, ()))

    def backend(self, name: str) -> "Backend":
        """The backend of this name, whether it exists or not."""
        if name not in self._backends:
            self._backends[name] = Backend(self, name)
        return self._backends[name]

    def backend_names(self) -> list[str]:
        """Names of all backends, sorted, by their files alone: imports nothing."""
        return sorted(
            {
                path.stem
                for path in self.folder.glob("*")
                if path.suffix in {".py", ".cu"}
                and not path.stem.startswith("_")
                and path.stem not in NOT_BACKENDS
            }
        )

    @property
    def backends(self) -> "list[Backend]":
        """All backends: those with a priority (on any device) first, then the others by name."""
        names = self.backend_names()
        declared = getattr(self.module, "BACKEND_PRIORITY", {})
        ranked = dict.fromkeys(name for ranking in declared.values() for name in ranking)
        return [self.backend(name) for name in dict.fromkeys([*ranked, *names]) if name in names]

    def register(
        self, schema: str, run: Callable[..., Any], check: Callable[..., None]
    ) -> "torch._ops.OpOverload":
        """Make ``torch.ops.custom_kernels.<name>``; called by the operation's module when it has
        declared BACKEND_PRIORITY and ``empty_output``.

        A call costs torch's dispatcher and ``run``, without the wrappers that
        torch.library.custom_op adds. torch.compile traces it with ``check`` and ``empty_output``.

        Args:
            schema: arguments and result, the last argument being ``str backend``.
            run: called with all arguments.
            check: called with all but the backend; raises where they do not fit.
        """
        import torch

        def fake(*arguments: Any) -> Any:
            check(*arguments[:-1])
            return self.module.empty_output(*arguments[:-1])

        # The library object keeps the registration alive.
        self._library = torch.library.Library("custom_kernels", "FRAGMENT")
        self._library.define(f"{self.name}{schema}")
        for device_type in self.module.BACKEND_PRIORITY:
            self._library.impl(self.name, run, device_type.upper())
        torch.library.register_fake(f"custom_kernels::{self.name}", fake, lib=self._library)
        return getattr(torch.ops.custom_kernels, self.name).default

    def _best(self, device: "torch.device", dtype: "torch.dtype | None" = None) -> "Backend":
        """The first backend by priority that can run on ``device`` and supports ``dtype``."""
        for backend in map(self.backend, self.priority(device.type)):
            supported = dtype is None or backend.supports_dtype(dtype)
            if supported and backend.unavailable_reason(device) is None:
                return backend
        raise BackendError(self._explain(None, device))

    def _runner(
        self, backend: str, device: "torch.device", dtype: "torch.dtype"
    ) -> Callable[..., Any]:
        """The function that runs this operation with a backend; compiles it if need be.

        Raises BackendError if the backend cannot run on ``device`` or does not support ``dtype``.
        """
        return self.backend(backend).runner(device, dtype)

    def _explain(self, backend: "Backend | None", device: "torch.device") -> str:
        reasons = {one.name: one.unavailable_reason(device) for one in self.backends}
        usable = ", ".join(name for name, reason in reasons.items() if reason is None) or "none"
        if backend is None:
            problem = "; ".join(
                f"{name}: {reason}" for name, reason in reasons.items() if reason is not None
            )
            return (
                f"{self} has no preferred backend that runs on {device} ({problem}); "
                f"available: {usable}"
            )
        reason = backend.unavailable_reason(device)
        return (
            f"{self} cannot use backend {backend.name!r} on {device}: {reason}; available: {usable}"
        )


class Backend:
    """One implementation of an operation. ``Operation.backend`` makes one per name."""

    def __init__(self, operation: Operation, name: str) -> None:
        self.operation = operation
        self.name = name

    def __str__(self) -> str:
        return f"{self.operation}.{self.name}"

    @property
    def python(self) -> Path:
        """Its ``.py``, whether it exists or not."""
        return self.operation.folder / f"{self.name}.py"

    @property
    def cuda(self) -> Path:
        """Its ``.cu``, whether it exists or not."""
        return self.operation.folder / f"{self.name}.cu"

    @property
    def files(self) -> list[Path]:
        """Its ``.py``, its ``.cu``, or both; none if there is no such backend."""
        return [path for path in (self.python, self.cuda) if path.is_file()]

    @property
    def kind(self) -> str:
        """What it is written in: ``cuda`` (it has a ``.cu``), ``triton``, ``cupy`` or ``torch``."""
        if self.cuda.is_file():
            return "cuda"
        match = _IMPORTS.search(self.python.read_text()) if self.python.is_file() else None
        return match[1] if match else "torch"

    @property
    def notes(self) -> dict[str, str]:
        """The notes in its files, see ``read_notes``."""
        return {name: value for path in self.files for name, value in read_notes(path).items()}

    def needs(self, note: str) -> list[str]:
        """The words of one of its notes; none without it."""
        return self.notes.get(note, "").split()

    @property
    def module(self) -> ModuleType | None:
        """Its Python half, imported; None if it has none."""
        return import_module(f"custom_kernels.{self}") if self.python.is_file() else None

    def architectures(self, wanted: Iterable[str]) -> tuple[str, ...]:
        """Those of ``wanted`` that it is written for."""
        only = self.needs("architectures")
        return tuple(name for name in wanted if not only or name in only)

    def supports_dtype(self, dtype: "torch.dtype") -> bool:
        """Whether it computes in this dtype: all do but those that list theirs, in ``DTYPES`` or in
        a comment ``// dtypes:`` of the ``.cu``."""
        dtypes = getattr(self.module, "DTYPES", None)
        if dtypes is not None:
            return dtype in dtypes
        names = self.needs("dtypes")
        return not names or str(dtype).removeprefix("torch.") in names

    def unavailable_reason(self, device: "torch.device | str") -> str | None:
        """Why it cannot run on ``device``; None if it can. Compiles nothing."""
        import torch

        device = torch.device(device)
        if not self.files:
            return "there is no such backend"
        if device.type == "cuda" and not torch.cuda.is_available():
            return "torch sees no GPU"
        kind = self.kind
        if device.type != "cuda" and kind in ("cuda", "cupy"):
            return "it runs on CUDA devices only"
        if device.type != "cuda" and kind == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
            return "without a GPU Triton only runs in its interpreter: set TRITON_INTERPRET=1"
        if kind == "cuda":
            from custom_kernels.compile import build, sources

            reason = build.unavailable_reason(self, sources.architecture(device))
            if reason is not None:
                return reason
        try:
            module = self.module
        except Exception as error:
            return f"importing it failed: {error!r}"
        needed = getattr(module, "MIN_CAPABILITY", (0, 0))
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < needed:
            major, minor = torch.cuda.get_device_capability(device)
            return (
                f"it needs compute capability {needed[0]}.{needed[1]} or later, this GPU has "
                f"{major}.{minor}"
            )
        reason_of: Callable[[torch.device], str | None] | None
        reason_of = getattr(module, "unavailable_reason", None)
        return reason_of(device) if reason_of is not None else None

    def require_available(self, device: "torch.device") -> None:
        """Raise BackendError, with the reason and what would run instead, unless it can run
        there."""
        if self.unavailable_reason(device) is not None:
            raise BackendError(self.operation._explain(self, device))

    def library(self, device: "torch.device | None" = None) -> Any:
        """Its compiled half, a ``tvm_ffi.Module``: see ``compile.build.load``."""
        from custom_kernels.compile import build

        return build.load(self, device)

    def runner(self, device: "torch.device", dtype: "torch.dtype") -> Callable[..., Any]:
        """See ``Operation.runner``, which remembers it."""
        self.require_available(device)
        if not self.supports_dtype(dtype):
            able = [one.name for one in self.operation.backends if one.supports_dtype(dtype)]
            raise BackendError(f"{self} does not support {dtype}; these do: {', '.join(able)}")
        module = self.module
        if module is not None:
            run: Callable[..., Any] = module.run
            return run

        compiled = self.library(device)[self.operation.name]
        empty_output = self.operation.module.empty_output

        def run_compiled(*arguments: Any) -> Any:
            out = empty_output(*arguments)
            compiled(*arguments, *(out if isinstance(out, tuple) else (out,)))
            return out

        return run_compiled

    def run(self, *arguments: Any) -> Any:
        """Run on the device of the first argument, a tensor, whose dtype it must support."""
        first = arguments[0]
        return self.operation.runner(self.name, first.device, first.dtype)(*arguments)


@dataclass(frozen=True)
class Specialization:
    """One variant of a Triton kernel, as a launch on a GPU would compile it.

    A Triton backend lists its own in ``specializations()``, made by the function with which the
    launch chooses its constants, so that the two cannot drift apart.
    """

    kernel: Any
    """The function under ``@triton.jit``."""
    signature: dict[str, str]
    """The type of each argument that is not a constant: ``{"x": "*bf16", "rows": "i32"}``."""
    constexprs: dict[str, Any] = field(default_factory=dict)
    """The value of each ``tl.constexpr`` argument."""
    num_warps: int = 4
    num_stages: int = 3
    label: str = ""
    """What tells it from the kernel's other variants, for example ``"M <= 16"``."""
    aligned: tuple[str, ...] = ()
    """Pointers and integers that a launch finds to be multiples of 16."""
    architectures: tuple[str, ...] = ()
    """The only ones on which it is launched; empty: all."""
