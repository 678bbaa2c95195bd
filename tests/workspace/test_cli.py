# SPDX-License-Identifier: Apache-2.0
"""What the verbs make of their variables."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from workspace import cli
from workspace.host.errors import CLOSED_PIPE, WorkspaceError, reported_in_one_line
from workspace.host.files import new_folder
from workspace.host.paths import ROOT


def collected(k: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/kernels"]
    result = subprocess.run(
        [*command, *cli.pytest_arguments(k)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return [line for line in result.stdout.splitlines() if "::" in line]


def test_an_operation_selects_its_own_tests_and_its_share_of_the_common_ones() -> None:
    found = collected("gemm")
    assert any("test_gemm.py::" in name for name in found)
    assert any(name.endswith("[gemm.triton]") for name in found)
    assert not any("sparse_gemm" in name for name in found)


def test_a_backend_selects_its_tests_only() -> None:
    found = collected("quant_expand.cupy")
    assert found
    assert all("cupy" in name for name in found)
    assert any("test_quant_expand.py::" in name for name in found)
    assert any(name.endswith("[quant_expand.cupy]") for name in found)


def test_a_kernel_is_split_into_operation_and_backend() -> None:
    assert cli.split_kernel("gemm") == ("gemm", None)
    assert cli.split_kernel("gemm.triton") == ("gemm", "triton")


def test_a_misspelt_operation_is_one_line_with_those_that_exist() -> None:
    with pytest.raises(WorkspaceError, match="no operation 'gem'; use one of gemm"):
        cli.split_kernel("gem")


def test_the_operations_are_known_before_anything_is_installed() -> None:
    program = "import sys; from workspace import cli\n"
    program += "cli.split_kernel('gemm.x'); cli.pytest_arguments('gemm')\n"
    program += "print([name for name in sys.modules if name.startswith('custom_kernels')])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


RECORD = "benchmarks/kernels/gemm-h200.json"


@pytest.mark.parametrize(
    "command",
    [
        ["workspace/bootstrap.py", "fork-status"],
        ["workspace/bootstrap.py", "fork-diff"],
        ["-m", "workspace", "inspect"],
        ["-m", "custom_kernels.bench.compare", RECORD, RECORD],
    ],
    ids=lambda words: words[-1] if words[-1] != RECORD else "compare",
)
def test_a_reader_that_leaves_ends_a_verb_without_a_word(command: list[str]) -> None:
    """As in `make fork-status | head -3`."""
    reads, writes = os.pipe()
    os.close(reads)
    # It has no kernels, so nothing is compiled.
    env = os.environ | {"K": "gemm.reference", "JSON": "1"}
    process = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, env=env, stdout=writes, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writes)
    assert [line for line in process.stderr.splitlines() if not line.startswith("· ")] == []
    assert process.returncode in (CLOSED_PIPE, -signal.SIGPIPE)


def test_another_pipe_that_breaks_is_told() -> None:
    with pytest.raises(SystemExit, match=r"^error: it: Broken pipe"), reported_in_one_line():
        raise BrokenPipeError("it: Broken pipe")


def test_ctrl_c_is_one_line_and_the_status_of_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, reported_in_one_line():
        raise KeyboardInterrupt
    assert end.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"


def test_a_package_that_is_missing_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    """As with ENV=system and a PYTHON that lacks it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    result = subprocess.run(
        [tmp_path / "env" / "bin" / "python", "-m", "workspace", "dev"],
        cwd=ROOT, env=os.environ | {"WORKSPACE_ENV": "system"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert re.fullmatch(r"error: .*/env lacks the package \w+; set PYTHON= .*\n", result.stderr)
    assert result.returncode == 1


def test_a_closed_pipe_is_not_blamed_on_a_folder(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), new_folder(tmp_path / "new"):
        raise BrokenPipeError
    assert list(tmp_path.iterdir()) == []
