# SPDX-License-Identifier: Apache-2.0
"""The last notebook: a kernel from a cell, in vLLM's engine, in a checkout of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from custom_kernels import paths

from tests.test_notebooks import outputs, printed
from tests.workspace.conftest import copy_files_of_this_checkout
from workspace import notebook
from workspace.bench import record
from workspace.host.paths import ROOT


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This checkout, edits included, with its environment and its vLLM: what the notebook writes
    meets no other test."""
    root = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", f"file://{ROOT}", str(root)], check=True)
    copy_files_of_this_checkout(root)
    (root / "vllm-fork" / "releases").symlink_to(ROOT / "vllm-fork" / "releases")
    monkeypatch.setenv("PYTHONPATH", str(root / "kernels"))
    monkeypatch.setenv("CUSTOM_KERNELS_CACHE", str(paths.cache_dir()))
    # Five engines start, and each would trace and compile some of vLLM's functions anew.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    return root


@pytest.mark.engine
@pytest.mark.slow
def test_a_kernel_of_a_cell_runs_in_the_engine_and_leaves_no_file(checkout: Path) -> None:
    pytest.importorskip("nbclient")

    def status() -> str:
        command = ["git", "status", "--porcelain"]
        return subprocess.run(
            command, cwd=checkout, capture_output=True, check=True
        ).stdout.decode()

    before = status()
    book = notebook.executed(checkout / "notebooks" / "06_into_vllm.ipynb")
    assert list(notebook.problems(book)) == []
    assert sum("image/png" in output.get("data", {}) for output in outputs(book)) == 2
    assert "the kernel was called 36 times" in printed(book)
    assert status() == before
    made = [record.read(path) for path in (checkout / "benchmarks" / "results").glob("*.json")]
    assert len(made) == 2
    for one in made:
        stock, custom = one.variants
        assert (one.valid, stock.launches, list(custom.launches)) == (True, {}, ["gemm.notebook"])
