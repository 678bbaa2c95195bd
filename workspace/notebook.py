# SPDX-License-Identifier: Apache-2.0
"""`make notebook`: JupyterLab for notebooks/, reachable from this machine only. And their outputs.

    python -m workspace.notebook [NAME ...]     # run notebooks and write their outputs into them

Committed notebooks hold the outputs of one run from top to bottom, written by that command: a
second run where nothing has changed gives the same file.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workspace.credentials.content import kind_in_text
from workspace.host.errors import WorkspaceError, reported_in_one_line, require
from workspace.host.files import write_file
from workspace.host.paths import ROOT
from workspace.host.text import say

NOTEBOOKS = ROOT / "notebooks"
COMMAND = "python -m workspace.notebook"

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""Of every notebook; Jupyter writes versions of the machine there."""
CODE = "code_sha256"
"""The metadata that says of which code cells the outputs are."""

MACHINE_PATH = re.compile(
    r"(?<![\w./~-])/(?:home|Users|root|work|tmp|opt|usr|var|mnt)/[\w.-]+|\bsite-packages\b"
)
TIME_OF_DAY = re.compile(r"\b\d{1,2}:\d{2}:\d{2}\b|\b\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}")
ADDRESS_OF_OBJECT = re.compile(r"\bat 0x[0-9a-f]{6,}")


def command() -> list[str]:
    """On loopback and with Jupyter's random token: who opens a notebook runs code as this user."""
    # -P: a folder kernels/ in the current folder must not be imported as the package of that name.
    return [
        sys.executable, "-P", "-m", "jupyterlab", "--ip=127.0.0.1", "--no-browser",
        f"--ServerApp.root_dir={NOTEBOOKS}",
        *(["--allow-root"] if os.geteuid() == 0 else []),  # in a container one may be root
    ]  # fmt: skip


def run() -> None:
    """Run until the user stops it; Jupyter prints the address with its token.

    Raises:
        WorkspaceError: JupyterLab is not installed.
    """
    require("jupyterlab")
    say("JupyterLab prints its address; press Ctrl-C twice to stop it")
    process = subprocess.Popen(command(), cwd=NOTEBOOKS, env=_environment())
    # Jupyter handles Ctrl-C: it asks before it stops its kernels.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGINT, previous)
    if status > 0:
        raise WorkspaceError(f"JupyterLab ended with status {status}; see its messages")


def _environment() -> dict[str, str]:
    # Kernels are compiled and inspected in notebooks, which the interpreter does not. Under pytest
    # ipykernel's sys.stdout has no file descriptor, and vLLM asks for it.
    dropped = ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST")
    return {name: value for name, value in os.environ.items() if name not in dropped}


# --- outputs --------------------------------------------------------------------------------------


def write_outputs(path: Path) -> bool:
    """Run a notebook in a new kernel and write it with its outputs; whether the file changed.

    Raises:
        WorkspaceError: a cell fails, or an output must not be committed.
    """
    book = executed(path)
    if found := list(problems(book)):
        raise WorkspaceError(
            f"{path.name} is not written: {'; '.join(found)}; change the cell and run "
            f"`{COMMAND} {path.stem}`"
        )
    content = as_text(book).encode()
    if content == path.read_bytes():
        return False
    write_file(path, content)
    return True


def executed(path: Path) -> Any:
    """The notebook with the outputs of a run from top to bottom in a new kernel, normalized.

    Raises:
        WorkspaceError: a cell fails; its message.
    """
    for package in ("nbformat", "nbclient", "ipykernel"):
        require(package)
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    book: Any = nbformat.read(path, as_version=4)
    client = NotebookClient(
        book, kernel_name="python3", record_timing=False, timeout=1800,
        resources={"metadata": {"path": str(path.parent)}},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        # Without the user's own startup files and history.
        environment = _environment() | {"IPYTHONDIR": folder, "MPLCONFIGDIR": folder}
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            raise WorkspaceError(
                f"{path.name} fails, open it with `make notebook`:\n{error}"
            ) from error
    normalize(book)
    book.metadata[CODE] = code_hash(book)
    return book


def normalize(book: Any) -> None:
    """Drop from a notebook what differs between two runs of the same cells, in place."""
    kept = {CODE: book.metadata[CODE]} if CODE in book.metadata else {}
    book.metadata.clear()
    book.metadata.update(METADATA | kept)
    book.nbformat, book.nbformat_minor = 4, 5
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number:02}"
        cell.metadata.clear()
        if cell.cell_type != "code":
            continue
        outputs: list[Any] = []
        for output in cell.outputs:
            # How much text arrives at a time depends on the machine's speed.
            if outputs and _stream(output) and _stream(output) == _stream(outputs[-1]):
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        cell.outputs = outputs


def _stream(output: Any) -> str | None:
    return output.name if output.output_type == "stream" else None


def as_text(book: Any) -> str:
    """The notebook's file."""
    import nbformat

    return str(nbformat.writes(book)).rstrip("\n") + "\n"


def code_hash(book: Any) -> str:
    """SHA-256 of the code cells."""
    code = "\0".join(cell.source for cell in book.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def problems(book: Any) -> Iterator[str]:
    """Why a notebook's outputs must not be committed, or are not those of its cells."""
    if book.metadata.get(CODE) != code_hash(book):
        yield "its outputs are not those of its code cells"
    number = 0
    for index, cell in enumerate(book.cells, 1):
        if cell.cell_type != "code":
            continue
        number += 1
        if cell.execution_count != number:
            yield f"cell {index} did not run in order"
        for output in cell.outputs:
            if output.output_type == "error" or _stream(output) == "stderr":
                yield f"cell {index} has an error or a warning: {_text(output)[-200:].strip()}"
            for what, text in _forbidden(_text(output)):
                yield f"cell {index} has {what}: {text}"


def _text(output: Any) -> str:
    """All of an output that is text, HTML and SVG included."""
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}"
    data = output.get("data", {})
    return str(output.get("text", "")) + "".join(
        str(value)
        for kind, value in data.items()
        if not kind.startswith("image/") or kind == "image/svg+xml"
    )


def _forbidden(text: str) -> Iterator[tuple[str, str]]:
    for what, pattern in (
        ("a path of one machine", MACHINE_PATH),
        ("a time of day", TIME_OF_DAY),
        ("an object's address", ADDRESS_OF_OBJECT),
    ):
        if found := pattern.search(text):
            yield what, found[0]
    if str(ROOT) in text:
        yield "the checkout's path", str(ROOT)
    if kind := kind_in_text(text):
        yield "a credential", kind  # its text is not shown


def main(names: list[str]) -> None:
    """Write the outputs of the notebooks of these names, or of all.

    Raises:
        WorkspaceError: there is no such notebook, or one of them cannot be written.
    """
    known = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    for name in names:
        if name not in known:
            raise WorkspaceError(f"notebooks/ has no {name!r}; it has {', '.join(known)}")
    for name in names or known:
        say(f"{name}: {'written' if write_outputs(known[name]) else 'unchanged'}")


if __name__ == "__main__":
    with reported_in_one_line():
        main(sys.argv[1:])
