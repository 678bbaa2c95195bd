# SPDX-License-Identifier: Apache-2.0
"""`make new-kernel OP=gemm BACKEND=triton NAME=mine`: scaffold a working kernel.

An operation that exists gets a backend; a name that is new becomes an operation of its own, with a
reference, cases and one backend. What is written are the files of templates/ with the
names changed: each of them is a kernel that is compiled and tested here.
"""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from custom_kernels import paths, registry
from custom_kernels.operation import NOT_BACKENDS

from workspace.host.errors import WorkspaceError
from workspace.host.files import write_file
from workspace.host.paths import ROOT
from workspace.host.text import say

TEMPLATES = Path(__file__).with_name("templates")
EXAMPLE = "scaled_silu"
"""The operation that a new one starts as."""
KINDS = {"triton": "triton.py", "cuda": "cuda.cu", "cupy": "cupy.py"}


def run(op: str | None, backend: str | None, name: str | None = None) -> list[Path]:
    """Write the files and say what to do with them.

    Raises:
        WorkspaceError: a name that cannot be one, a file that exists already, or an operation
            without a template; nothing is written.
    """
    if not op or not backend:
        raise WorkspaceError(
            "name an operation and what to write it in: "
            f"make new-kernel OP=gemm BACKEND={'|'.join(KINDS)}"
        )
    if backend not in KINDS:
        raise WorkspaceError(f"BACKEND={backend} is not known; give {', '.join(KINDS)}")
    name = name or backend
    _check_name("OP", op)
    _check_name("NAME", name)
    files = _files(op, backend, name)
    for path in files:
        if path.exists():
            raise WorkspaceError(
                f"{_shown(path)} exists; give another name: "
                f"make new-kernel OP={op} BACKEND={backend} NAME=my_{name}"
            )
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text.encode())
        say(f"wrote {_shown(path)}")
    kernel = f"{op}.{name}"
    print(
        f"  make watch K={kernel}            edit it and see\n"
        f"  make test K={kernel}             is it right?\n"
        f"  make inspect K={kernel}          registers, spills, instructions\n"
        f"  make bench-kernels K={op} BACKEND={name}   is it fast? (GPU)"
    )
    return list(files)


def _files(op: str, backend: str, name: str) -> dict[Path, str]:
    """What to write where."""
    folder = paths.PACKAGE / op
    known = [operation.name for operation in registry.operations()]
    suffix = Path(KINDS[backend]).suffix
    if op in known:
        example = EXAMPLE if _started_as_example(op) else op
        template = TEMPLATES / example / KINDS[backend]
        if name in registry.operation(op).backend_names():
            # Also where only the other half is there: the two would become one backend.
            existing = next(path for path in folder.glob(f"{name}.*") if path.is_file())
            raise WorkspaceError(
                f"{_shown(existing)} exists; give another name: "
                f"make new-kernel OP={op} BACKEND={backend} NAME=my_{name}"
            )
        if not template.is_file():
            raise WorkspaceError(_copy_instead(op, backend))
        return {folder / f"{name}{suffix}": template.read_text().replace(example, op)}
    if folder.exists() or folder.with_suffix(".py").exists():
        raise WorkspaceError(f"OP={op} is taken by {_shown(paths.PACKAGE)} itself; give another")
    names = {"__init__.py", "reference.py", "cases.py"}
    texts = {folder / one: (TEMPLATES / EXAMPLE / one).read_text() for one in sorted(names)}
    texts[folder / f"{name}{suffix}"] = (TEMPLATES / EXAMPLE / KINDS[backend]).read_text()
    return {path: text.replace(EXAMPLE, op) for path, text in texts.items()}


def _started_as_example(op: str) -> bool:
    """Whether the operation still takes what a new one does, so that its templates fit."""
    function = re.compile(r"^def exact\(.*$", re.MULTILINE)
    own, example = (
        function.search((folder / "reference.py").read_text())
        for folder in (paths.PACKAGE / op, TEMPLATES / EXAMPLE)
    )
    return own is not None and example is not None and own[0] == example[0]


def _copy_instead(op: str, backend: str) -> str:
    alike = [one.name for one in registry.select([op]) if one.kind == backend]
    folder = paths.PACKAGE / op
    found = [
        path for one in alike for path in (folder / f"{one}.py", folder / f"{one}.cu")
        if path.is_file()
    ]  # fmt: skip
    start = " and ".join(map(_shown, found)) or _shown(folder / "reference.py")
    return f"{op} has no small {backend} kernel to start from: copy {start}"


def _check_name(variable: str, name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise WorkspaceError(
            f"{variable}={name} cannot name a Python module; use lower-case letters, digits and _"
        )
    if variable == "NAME" and name in NOT_BACKENDS | {"reference"}:
        raise WorkspaceError(f"NAME={name} is a file that every operation has; give another")


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
