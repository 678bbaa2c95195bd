# SPDX-License-Identifier: Apache-2.0
"""Notebooks run from top to bottom in a fresh kernel, with a GPU and without; JupyterLab starts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import nbformat
import pytest

from workspace import notebook

NOTEBOOKS = sorted(notebook.NOTEBOOKS.glob("*.ipynb"))
ALL = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_is_a_first_one() -> None:
    assert [path.name for path in NOTEBOOKS][:1] == ["01_rawkernel.ipynb"]


@ALL
def test_committed_without_outputs(path: Path) -> None:
    book: Any = nbformat.read(path, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.slow
@ALL
def test_runs_from_top_to_bottom(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    book: Any = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        book, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs
    )
    assert "LDG 16 B" in text


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
