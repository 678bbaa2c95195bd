# SPDX-License-Identifier: Apache-2.0
"""Notebooks run from top to bottom in a fresh kernel, with a GPU and without; JupyterLab starts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from workspace import notebook

NOTEBOOKS = sorted(notebook.NOTEBOOKS.glob("*.ipynb"))
# nbformat is imported where it is used: that takes seconds, in each process of the suite.
ALL = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
IN_ENGINE = "06_into_vllm"
"""It runs in test_notebook_in_engine.py."""
WITHOUT_ENGINE = pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.stem != IN_ENGINE], ids=lambda path: path.stem
)


def test_they_are_numbered_from_the_first() -> None:
    numbers = [int(path.stem.partition("_")[0]) for path in NOTEBOOKS]
    assert numbers == list(range(1, len(numbers) + 1))


@ALL
def test_committed_with_the_outputs_of_one_run_and_nothing_of_the_machine(path: Path) -> None:
    import nbformat

    book: Any = nbformat.read(path, as_version=4)
    again = f"run `{notebook.COMMAND} {path.stem}`"
    assert list(notebook.problems(book)) == [], again
    notebook.normalize(book)
    assert notebook.as_text(book) == path.read_text(), again


@pytest.mark.slow
@WITHOUT_ENGINE
def test_runs_from_top_to_bottom(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as `make test` sets it where there is no GPU
    book = notebook.executed(path)
    assert list(notebook.problems(book)) == []
    assert any("image/png" in output.get("data", {}) for output in outputs(book))
    assert "LDG 16 B" in printed(book) or path.stem == "04_sparsity"  # which inspects no kernel


def outputs(book: Any) -> list[Any]:
    return [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(book: Any) -> str:
    """All text of the outputs."""
    return "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "")
        for output in outputs(book)
    )


def written(folder: Path, *cells: str) -> Path:
    import nbformat

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    path = folder / "one.ipynb"
    nbformat.write(book, path)
    return path


def test_a_second_run_gives_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    import nbformat

    path = written(tmp_path, "import time\nprint(1, flush=True)\ntime.sleep(0.3)\nprint(2)", "3")
    assert notebook.write_outputs(path)
    book: Any = nbformat.read(path, as_version=4)
    assert [output.get("text") for output in outputs(book)] == ["1\n2\n", None]
    assert not notebook.write_outputs(path)
    book.cells[1].source = "4"
    assert list(notebook.problems(book)) == ["its outputs are not those of its code cells"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("/home/" + "me/kernels/x.py", "a path of one machine"),
        (f"{notebook.ROOT}/x.py", "path"),
        ("lib/python3.12/site-packages/torch", "a path of one machine"),
        ("started at 12:30:01", "a time of day"),
        ("2026-01-02T03:04", "a time of day"),
        ("<object at 0x7f00aabbcc>", "an object's address"),
        ("HF_TOKEN=hf_" + "Qm3vXz9Lk2Wp7Rt5Ys8Bn4Cd6Fg1Hj0AaE", "a credential"),
    ],
)
def test_an_output_that_names_the_machine_is_refused(text: str, problem: str) -> None:
    import nbformat

    cell: Any = nbformat.v4.new_code_cell("x", execution_count=1)
    book: Any = nbformat.v4.new_notebook(cells=[cell])
    book.metadata[notebook.CODE] = notebook.code_hash(book)
    cell.outputs = [nbformat.v4.new_output("stream", text="2:4 and 14:16 in 0.5 ms on sm_90")]
    assert list(notebook.problems(book)) == []
    cell.outputs = [nbformat.v4.new_output("display_data", {"text/plain": text})]
    assert any(problem in found for found in notebook.problems(book))


@pytest.mark.slow
def test_jupyterlab_starts_on_loopback_with_a_token(tmp_path: Path) -> None:
    pytest.importorskip("jupyterlab")
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*notebook.command(), "--port=0"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        seen = ""
        for line in process.stdout:
            seen += line
            if re.search(r"http://127\.0\.0\.1:\d+/lab\?token=\w{20,}", line):
                break
        else:
            raise AssertionError(seen)
        assert "0.0.0.0" not in seen
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
