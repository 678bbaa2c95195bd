# SPDX-License-Identifier: Apache-2.0
"""`make new-kernel OP=gemm BACKEND=triton NAME=mine`: scaffold a working kernel.

An existing operation gets a backend; a new name becomes an operation with a reference, cases and
one backend. The files are those of templates/ with the names replaced, or a copy of the operation's
only kernel in that language: working kernels, which are compiled and tested in this repository.
"""

from __future__ import annotations

import keyword
import re
import tempfile
from pathlib import Path

from custom_kernels import paths, registry
from custom_kernels.operation import NOT_BACKENDS

from workspace import verbs
from workspace.host.errors import WorkspaceError
from workspace.host.files import PARTIAL, write_file
from workspace.host.paths import ROOT
from workspace.host.text import say

TEMPLATES = Path(__file__).with_name("templates")
EXAMPLE = "scaled_silu"
"""The operation that a new one starts as."""
KINDS = {"triton": "triton.py", "cuda": "cuda.cu", "cupy": "cupy.py"}


def run(options: verbs.NewKernel) -> None:
    """Write the files and say what to do with them.

    Raises:
        WorkspaceError: an invalid name, a file that exists already, or an operation without a
            template; nothing is written.
    """
    op, backend = options.op, options.backend
    if not op or not backend:
        raise WorkspaceError(
            "name an operation and what to write it in: "
            f"make new-kernel OP=gemm BACKEND={'|'.join(KINDS)}"
        )
    if backend not in KINDS:
        raise WorkspaceError(f"BACKEND={backend} is not known; use {', '.join(KINDS)}")
    name = options.name or backend
    _check_name("OP", op)
    _check_name("NAME", name)
    files = _files(op, backend, name)
    # Also where only a .py or a .cu of that name exists: the two would become one backend.
    existing = next((path for file in files for path in file.parent.glob(f"{file.stem}.*")), None)
    if existing is not None:
        raise WorkspaceError(
            f"{_shown(existing)} exists; use another name: "
            f"make new-kernel OP={op} BACKEND={backend} NAME=my_{name}"
        )
    if len(files) == 1:
        ((path, text),) = files.items()
        write_file(path, text.encode())
    else:
        _write_operation(paths.PACKAGE / op, files)
    for path in files:
        say(f"wrote {_shown(path)}")
    kernel = f"{op}.{name}"
    print(
        f"  make watch K={kernel}            edit it and see\n"
        f"  make test K={kernel}             is it right?\n"
        f"  make inspect K={kernel}          registers, spills, instructions\n"
        f"  make bench-kernels K={op} BACKEND={name}   is it fast? (GPU)"
    )


def _write_operation(folder: Path, files: dict[Path, str]) -> None:
    """An operation is there with all its files or not at all; it is made outside of the package,
    which would take half of it for one."""
    with tempfile.TemporaryDirectory(dir=paths.PACKAGE.parent, prefix=PARTIAL) as work:
        made = Path(work) / folder.name
        made.mkdir()
        for path, text in files.items():
            (made / path.name).write_text(text)
        made.rename(folder)


def _files(op: str, backend: str, name: str) -> dict[Path, str]:
    """Path → content of each file to write."""
    folder = paths.PACKAGE / op
    file = (folder / name).with_suffix(Path(KINDS[backend]).suffix)
    if (folder / "reference.py").is_file():
        example = EXAMPLE if _started_as_example(op) else op
        templates = {file: TEMPLATES / example / KINDS[backend]}
        if not templates[file].is_file() and (own := _alike(op, backend)) and len(own) == 1:
            templates[file] = own[0]  # the operation's only kernel in this language
    elif folder.exists() or folder.with_suffix(".py").exists():
        raise WorkspaceError(f"OP={op} is used by {_shown(paths.PACKAGE)}; use another name")
    else:
        example = EXAMPLE
        names = ("__init__.py", "cases.py", "reference.py")
        templates = {folder / one: TEMPLATES / EXAMPLE / one for one in names}
        templates[file] = TEMPLATES / EXAMPLE / KINDS[backend]
    if not all(template.is_file() for template in templates.values()):
        raise WorkspaceError(_copy_instead(op, backend))
    return {path: template.read_text().replace(example, op) for path, template in templates.items()}


def _started_as_example(op: str) -> bool:
    """Whether the operation still has the arguments of a new one, so that its templates fit."""
    signatures = [
        re.findall(r"^def exact\(.*$", (folder / "reference.py").read_text(), re.MULTILINE)
        for folder in (paths.PACKAGE / op, TEMPLATES / EXAMPLE)
    ]
    return signatures[0] == signatures[1]


def _alike(op: str, backend: str) -> list[Path]:
    """The files of an operation's kernels in a language."""
    return [path for one in registry.select([op]) if one.kind == backend for path in one.files]


def _copy_instead(op: str, backend: str) -> str:
    files = _alike(op, backend) or [paths.PACKAGE / op / "reference.py"]
    return f"{op} has no small {backend} kernel to start from: copy {', '.join(map(_shown, files))}"


def _check_name(variable: str, name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise WorkspaceError(
            f"{variable}={name} cannot name a Python module; use lower-case letters, digits and _"
        )
    if variable == "NAME" and name in NOT_BACKENDS | {"reference"}:
        raise WorkspaceError(f"NAME={name} is a file that every operation has; use another name")


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
