# SPDX-License-Identifier: Apache-2.0
"""Operations and backends are found by their files; what cannot run says why."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from custom_kernels import registry
from custom_kernels.compile import build, toolchain

from tests.kernels.conftest import PackageCopy

OPERATION = """
import torch
BACKEND_PRIORITY = {"cpu": ("twice", "reference")}
def custom_double(x): return torch.ops.custom_kernels.double(x)
def empty_output(x): return torch.empty_like(x)
"""
PROGRAM = """
import torch, custom_kernels
from custom_kernels import registry
double = registry.operation("double")
print(list(map(str, registry.operations())))
print([one.name for one in double.backends])
cpu = torch.device("cpu")
print(double.best(cpu, torch.float32).name)
print(double.runner("twice", cpu, torch.float32)(torch.ones(2)).tolist())
print(double.backend("twice").run(torch.ones(2)).tolist())
print(double.backend("compiled").unavailable_reason(cpu))
print(double.backend("broken").unavailable_reason(cpu))
print(double.backend("picky").unavailable_reason(cpu))
print(custom_kernels.custom_double.__name__)
"""


def test_an_operation_and_its_backends_are_found_by_dropping_files(
    package_copy: PackageCopy,
) -> None:
    package_copy.add("double/__init__.py", OPERATION)
    package_copy.add("double/reference.py", "def run(x): return 2 * x\n")
    package_copy.add("double/twice.py", "def run(x): return x + x\n")
    package_copy.add("double/compiled.cu", "// no Python half\n")
    package_copy.add("double/broken.py", "import absent_library\n")
    package_copy.add(
        "double/picky.py",
        "def unavailable_reason(device): return f'not on {device}'\ndef run(x): ...\n",
    )
    package_copy.add("double/_helper.py", "")
    result = package_copy.python("-c", PROGRAM)
    assert result.stdout.splitlines() == [
        "['double']",
        "['twice', 'reference', 'broken', 'compiled', 'picky']",
        "twice",
        "[2.0, 2.0]",
        "[2.0, 2.0]",
        "it runs on CUDA devices only",
        "importing it failed: ModuleNotFoundError(\"No module named 'absent_library'\")",
        "not on cpu",
        "custom_double",
    ], result.stderr


def test_a_misspelt_backend_is_one_line_with_those_that_run() -> None:
    with pytest.raises(registry.BackendError) as error:
        registry.operation("gemm").runner("cublastl", torch.device("cpu"), torch.float32)
    # Triton's is there too where its interpreter was chosen.
    assert str(error.value).removesuffix(", triton") == (
        "gemm cannot use backend 'cublastl' on cpu: there is no such backend; available: reference"
    )


def test_an_unknown_operation_is_one_line_with_those_that_exist() -> None:
    with pytest.raises(registry.BackendError, match=r"no operation 'gem'; there are: .*gemm"):
        registry.operation("gem")


def test_a_compiled_backend_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_tools() -> toolchain.Toolchain:
        raise toolchain.BuildError("there is no nvcc: run `make dev`")

    monkeypatch.setattr(toolchain, "find", no_tools)
    backend = registry.operation("gemm").backend("cublaslt")
    assert build.unavailable_reason(backend, "9.0a") == "there is no nvcc: run `make dev`"


def test_importing_the_package_imports_nothing_else() -> None:
    program = (
        "import sys, custom_kernels; "
        "print([name for name in sys.modules if name.startswith(('torch', 'tvm'))])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
