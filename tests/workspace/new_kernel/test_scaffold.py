# SPDX-License-Identifier: Apache-2.0
"""make new-kernel: what it writes works at once, and it never writes over anything."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import tvm_ffi
from custom_kernels import paths
from custom_kernels.inspect.report import Report
from custom_kernels.inspect.table import cells, short

from tests.conftest import nvcc_missing
from workspace import verbs
from workspace.host.errors import WorkspaceError
from workspace.host.git import git
from workspace.host.paths import ROOT
from workspace.new_kernel import scaffold


@dataclass(frozen=True)
class Copy:
    """A copy of the package with the operation gemm, but none of its backends."""

    root: Path
    cache: Path

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.root), str(ROOT)]),
            "CUSTOM_KERNELS_CACHE": str(self.cache),
        }
        environment.pop("TRITON_INTERPRET", None)
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def inspect(self, kernels: Iterable[str]) -> list[Report]:
        """What the compilers made of them for 9.0a, without a warning."""
        found = self.python("-m", "custom_kernels.inspect", *kernels, "--arch=9.0a", "--json")
        assert found.returncode == 0, found.stderr
        document = json.loads(found.stdout)
        assert document["warnings"] == []
        for report in document["reports"]:
            del report["occupancy"]
        return [Report(**report) for report in document["reports"]]

    def error(self, *arguments: str) -> str:
        """What `make new-kernel` cannot do with these values."""
        with pytest.raises(WorkspaceError) as caught:
            scaffold.run(verbs.NewKernel(*arguments))
        return str(caught.value)

    def files(self) -> set[str]:
        package = self.root / "custom_kernels"
        return {
            str(path.relative_to(package))
            for path in package.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    made = Copy(tmp_path / "copy", tmp_path / "cache")
    own = {"__init__.py", "reference.py", "cases.py"}

    def unwanted(folder: str, names: list[str]) -> list[str]:
        here = Path(folder)
        if here == paths.PACKAGE:
            other = {path.parent.name for path in here.glob("*/reference.py")} - {"gemm"}
            return [name for name in names if name in other or name == "__pycache__"]
        return [name for name in names if here.name == "gemm" and name not in own]

    shutil.copytree(paths.PACKAGE, made.root / "custom_kernels", ignore=unwanted)
    monkeypatch.setattr(paths, "PACKAGE", made.root / "custom_kernels")
    return made


@pytest.mark.parametrize("backend", ["triton", "cuda", "cupy"])
def test_without_a_template_it_starts_as_the_operations_own_kernel(backend: str) -> None:
    (written,) = scaffold._files("silu_and_mul", backend, "mine").items()
    suffix = {"cuda": ".cu"}.get(backend, ".py")
    assert written[0] == (paths.PACKAGE / "silu_and_mul" / "mine").with_suffix(suffix)
    own = written[0].with_name(f"{backend}{suffix}")
    assert written[1] == own.read_text()


@pytest.mark.slow
def test_new_kernels_of_every_kind_work_at_once(copy: Copy) -> None:
    """In an operation that exists, and in one that the first of them adds."""
    kinds = {"triton": ".py", "cupy": ".py"}
    if not nvcc_missing():
        kinds["cuda"] = ".cu"
    operations = ("gemm", "gelu_gate")
    before = copy.files()
    for operation in operations:
        for kind in kinds:
            scaffold.run(verbs.NewKernel(operation, kind, f"my_{kind}"))
    wanted = {f"{name}/my_{kind}{kinds[kind]}" for name in operations for kind in kinds}
    wanted |= {f"gelu_gate/{name}.py" for name in ("__init__", "reference", "cases")}
    assert copy.files() - before == wanted
    for name in wanted:
        assert "scaled_silu" not in (copy.root / "custom_kernels" / name).read_text()

    mine = [f"{operation}.my_{kind}" for operation in operations for kind in kinds]
    reports = copy.inspect(mine)
    tensor: dict[str, bool] = {}
    for report in reports:
        name = f"{report.operation}.{report.backend}"
        tensor[name] = tensor.get(name, False) or bool(report.tensor)
    assert tensor == {name: name.startswith("gemm.") for name in mine}

    checked = copy.python("-m", "custom_kernels.check", *operations)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    lines = dict(line.split(" ", 1) for line in checked.stdout.splitlines())
    for name in ("gemm.my_triton", "gelu_gate.my_triton", "gelu_gate.reference"):
        assert "cases right" in lines[name]
    for kind in kinds:
        page = Page(kind)
        if AS_SHOWN:
            assert page.tables()[0] == rows(reports, kind)
        if not torch.cuda.is_available():
            (shown,) = page.outputs("custom_kernels.check")
            shown = shown.partition("; available")[0].replace("mine", f"my_{kind}")
            assert without_numbers(shown) in without_numbers(checked.stdout)
    program = (
        "import torch; from custom_kernels import custom_gelu_gate as run\n"
        "x, scale = torch.randn(2, 3, 8), torch.ones(8)\n"
        "assert torch.equal(run(x, scale), torch.nn.functional.silu(x))\n"
        "torch.library.opcheck(torch.ops.custom_kernels.gelu_gate, (x, scale, 'reference'))"
    )
    called = copy.python("-c", program)
    assert called.returncode == 0, called.stderr


def test_without_a_name_a_kernel_is_called_as_its_kind(copy: Copy) -> None:
    scaffold.run(verbs.NewKernel("gelu_gate", "cuda"))
    assert "gelu_gate/cuda.cu" in copy.files()


def test_nothing_is_written_over(copy: Copy) -> None:
    scaffold.run(verbs.NewKernel("gemm", "cupy"))
    before = copy.files()
    again = copy.error("gemm", "cupy")
    assert "gemm/cupy.py exists; use another name" in again
    assert "NAME=my_cupy" in again
    # A .cu beside a .py of that name would become one backend with it.
    assert "exists" in copy.error("gemm", "cuda", "cupy")
    assert copy.files() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gemm",), "name an operation and what to write it in"),
        (("gemm", "cutlass"), "BACKEND=cutlass is not known; use triton, cuda, cupy"),
        (("my-op", "cuda"), "OP=my-op cannot name a Python module"),
        (("../gemm", "cuda"), "OP=../gemm cannot name a Python module"),
        (("class", "cuda"), "OP=class cannot name a Python module"),
        (("gemm", "cuda", "Mine"), "NAME=Mine cannot name a Python module"),
        (("gemm", "cuda", "cases"), "NAME=cases is a file that every operation has"),
        (("norm", "cuda", "reference"), "NAME=reference is a file that every operation has"),
        (("launches", "cuda"), "OP=launches is used"),
        (("vllm", "cuda"), "OP=vllm is used"),
    ],
)
def test_a_bad_name_is_one_clear_line(copy: Copy, arguments: tuple[str, ...], message: str) -> None:
    before = copy.files()
    error = copy.error(*arguments, *[""] * (2 - len(arguments)))
    assert message in error
    assert "\n" not in error
    assert copy.files() == before


def test_an_operation_without_a_template_says_what_to_copy(copy: Copy) -> None:
    folder = copy.root / "custom_kernels" / "other"
    folder.mkdir()
    texts = {"__init__": "", "reference": ""} | dict.fromkeys(("fast", "other"), "import triton\n")
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    error = copy.error("other", "triton", "mine")
    assert "other has no small triton kernel to start from: copy " in error
    assert "other/fast.py" in error


@pytest.mark.parametrize(
    "template",
    sorted(scaffold.TEMPLATES.rglob("*.py")),
    ids=lambda path: str(path.relative_to(scaffold.TEMPLATES)),
)
def test_what_it_writes_passes_ruff_in_its_place(template: Path) -> None:
    place = "kernels/custom_kernels/gemm/mine.py"  # in a folder of the package
    for command in (["check"], ["format", "--check"]):
        checked = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--stdin-filename", place, "-"],
            input=template.read_text(), cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert checked.returncode == 0, checked.stdout


# --- the pages on a first kernel ------------------------------------------------------------------

AS_SHOWN = Path(sys.prefix) == ROOT / ".venv"
"""Whether the compilers are those of the pages: of the default release."""


@dataclass(frozen=True)
class Page:
    kind: str

    def blocks(self, language: str) -> list[str]:
        text = (ROOT / "docs" / f"first-kernel-{self.kind}.md").read_text()
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        return [block for named, block in blocks if named == language]

    def outputs(self, command: str) -> list[str]:
        """What the page shows under each such command."""
        transcripts = [block.split("\n", 1) for block in self.blocks("")]
        return [output for first, output in transcripts if command in first]

    def tables(self) -> list[dict[str, list[str]]]:
        """Of each `make inspect`: kernel → the cells that depend on its code alone."""
        found = []
        for output in self.outputs("make inspect"):
            lines = [line.strip("│").split("│") for line in output.splitlines() if line[0] == "│"]
            stripped = [[cell.strip() for cell in line] for line in lines]
            found.append({name.partition(": ")[2]: kept(rest) for name, *rest in stripped})
        return found


def kept(shown: list[str]) -> list[str]:
    """Without registers, occupancy and sizes, which may change with a compiler."""
    return [cell for number, cell in enumerate(shown) if number not in (1, 6, 7, 8)]


def rows(reports: list[Report], kind: str) -> dict[str, list[str]]:
    found = [one for one in reports if (one.operation, one.backend) == ("gemm", f"my_{kind}")]
    return {short(one.kernel): kept(cells(one)) for one in found}


def without_numbers(text: str) -> str:
    return re.sub(r"\d+(\.\d+)?", "N", text)


@pytest.mark.slow
@pytest.mark.skipif(not AS_SHOWN, reason="the pages show the default release's compilers")
def test_the_pages_on_a_first_kernel_show_what_happens(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, template in scaffold.KINDS.items():
        page, name = Page(kind), f"my_{kind}"
        scaffold.run(verbs.NewKernel("gemm", kind, name))
        said = "".join(reversed(capsys.readouterr())).replace(f"{copy.root}/", "kernels/")
        assert page.outputs("make new-kernel") == [said.replace(name, "mine")]
        file = (copy.root / "custom_kernels" / "gemm" / name).with_suffix(Path(template).suffix)
        for code in page.blocks("python") + page.blocks("cuda"):
            assert code in file.read_text()
        (change,) = page.blocks("diff")
        patch = change.replace("kernels/custom_kernels/gemm/mine", f"custom_kernels/gemm/{name}")
        git("apply", tree=copy.root, stdin=patch.encode())
    reports = copy.inspect(f"gemm.my_{kind}" for kind in scaffold.KINDS)
    for kind in scaffold.KINDS:
        assert Page(kind).tables()[1] == rows(reports, kind)
    (library,) = copy.cache.glob("gemm.my_cuda-*.so")
    assert tvm_ffi.load_module(str(library))["gemm"] is not None
    checked = copy.python("-m", "custom_kernels.check", "gemm.my_triton", "--quick")
    assert checked.returncode == 0, checked.stdout + checked.stderr
