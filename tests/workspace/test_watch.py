# SPDX-License-Identifier: Apache-2.0
"""make watch, driven as by an editor: files are saved in a copy of the package, verdicts read."""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from custom_kernels import build

from workspace import watch
from workspace.errors import WorkspaceError
from workspace.paths import ROOT

OPERATION = """
import torch
from custom_kernels import registry

PREFERENCE = {"cuda": (), "cpu": ("reference",)}


def empty_output(x):
    return torch.empty_like(x)


def custom_toy(x, *, backend=None):
    return registry.runner("toy", backend or "reference", x.device, x.dtype)(x)
"""
REFERENCE = """
def run(x):
    return 2 * x


def exact(x):
    return 2 * x.double()
"""
CASES = """
import torch
from custom_kernels.timing import Case

DTYPES = ("float32",)


def checks(dtype):
    for m in (1, 3):
        yield Case(
            {"M": m},
            lambda device, m=m: (torch.empty(m, 64, device=device),),
            lambda inputs: inputs[0].normal_(),
            64.0 * m,
            512.0 * m,
            1e-6,
        )
"""
TRITON = """
import triton
import triton.language as tl
import torch
from custom_kernels.inspection import Specialization


@triton.jit
def double(x, y, K: tl.constexpr):
    row = tl.program_id(0) * K
    columns = tl.arange(0, K)
    tl.store(y + row + columns, FACTOR * tl.load(x + row + columns))


FACTOR: tl.constexpr = tl.constexpr(2.0)


def run(x):
    y = torch.empty_like(x)
    double[(x.shape[0],)](x, y, x.shape[1])
    return y


def specializations():
    return [Specialization(double, {"x": "*fp32", "y": "*fp32"}, {"K": 64})]
"""
CUPY = '''
import cupy

KERNEL = cupy.RawKernel(r"""
extern "C" __global__ void __launch_bounds__(64) twice(const float* x, float* y) {
  int i = blockIdx.x * 64 + threadIdx.x;
  y[i] = 2.f * x[i];
}
""", "twice")


def run(x):
    raise NotImplementedError
'''
CUDA = """
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

__global__ void twice(const float* x, float* y) {
  int i = blockIdx.x * 64 + threadIdx.x;
  y[i] = 2.f * x[i];
}

static void toy(tvm::ffi::TensorView x, tvm::ffi::TensorView y) {
  twice<<<x.size(0), 64>>>((float*)x.data_ptr(), (float*)y.data_ptr());
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(toy, toy);
"""

VERDICT = re.compile(r"^\[(\d+)\] toy\.(\w+): ([a-z ]+?)(?: \(.*\))?, ([\d.]+) s$")


class Editor:
    """A copy of the package with an operation of its own, and a watch over it."""

    def __init__(self, folder: Path) -> None:
        self.package = folder / "copy" / "custom_kernels"
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder / "copy"), str(ROOT)]),
            "CUSTOM_KERNELS_CACHE": str(folder / "cache"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
        }
        shutil.copytree(
            build.PACKAGE,
            self.package,
            ignore=lambda _, names: [
                name
                for name in names
                if name == "__pycache__" or (build.PACKAGE / name / "reference.py").is_file()
            ],
        )
        for name, text in {
            "__init__.py": OPERATION, "reference.py": REFERENCE, "cases.py": CASES,
        }.items():  # fmt: skip
            self.save(name, text)
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str] = queue.Queue()
        self.kept: list[str] = []

    def save(self, name: str, text: str) -> None:
        """As editors do: beside, then renamed."""
        path = self.package / "toy" / name
        path.parent.mkdir(exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(text)
        beside.replace(path)

    def watch(self, k: str, timeout: int = 20) -> None:
        program = "import sys; from workspace import watch; watch.run(*sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, k, "", str(timeout)],
            env=self.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))

    def verdict(self, number: int) -> tuple[str, float, str]:
        """State, seconds and the lines below of verdict ``number``; waits for it."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            for index, line in enumerate(self.kept):
                found = VERDICT.match(line)
                if found and int(found[1]) == number:
                    below = self.kept[index + 1 :]
                    return found[3], float(found[4]), "\n".join(below)
            self.kept.append(self.lines.get(timeout=90))
            while self.kept and VERDICT.match(self.kept[-1]):
                # What belongs to it comes at once.
                time.sleep(0.3)
                while not self.lines.empty():
                    self.kept.append(self.lines.get())
                break
        raise AssertionError("\n".join(self.kept))

    def end(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)


@pytest.fixture
def editor(tmp_path: Path) -> Iterator[Editor]:
    made = Editor(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


@pytest.mark.slow
def test_a_triton_kernel_through_a_morning(editor: Editor) -> None:
    editor.save("triton.py", TRITON)
    editor.watch("toy.triton", timeout=8)
    state, _, below = editor.verdict(1)
    assert state == "right"
    assert "registers" in below

    editor.save("triton.py", TRITON.replace("tl.constexpr(2.0)", "tl.constexpr(3.0)"))
    state, _, below = editor.verdict(2)
    assert state == "wrong"
    assert "M=1: error 5.0e-01, 1.0e-06 is allowed; first at output[0, 0]" in below

    editor.save("triton.py", TRITON.replace("tl.load(x", "tl.fetch(x"))
    state, _, below = editor.verdict(3)
    line = TRITON.splitlines().index(
        "    tl.store(y + row + columns, FACTOR * tl.load(x + row + columns))"
    )
    assert state == "does not compile"
    assert f"toy/triton.py:{line + 1}: " in below
    assert "fetch" in below

    editor.save(
        "triton.py", TRITON.replace("    y = torch", "    import os; os.abort()\n    y = torch")
    )
    state, _, below = editor.verdict(4)
    assert state == "crashed"
    assert "Aborted" in below

    editor.save("triton.py", TRITON.replace("    y = torch", "    while True: pass\n    y = torch"))
    state, _, below = editor.verdict(5)
    assert state == "hangs"

    editor.save("triton.py", "import triton\ndef run(x:\n")
    state, _, below = editor.verdict(6)
    assert state == "does not compile"
    assert "line 2" in below

    editor.save(
        "triton.py",
        TRITON.replace(
            "tl.load(x + row + columns)", "tl.load(x + row + columns // 2 * 2 + columns % 2)"
        ),
    )
    state, seconds, _ = editor.verdict(7)
    assert state == "right"
    assert seconds < 20  # under 3 s on a quiet machine
    assert editor.end() == 0


@pytest.mark.slow
def test_a_cupy_kernel_and_one_that_does_not_compile_at_first(editor: Editor) -> None:
    editor.save("cupy.py", CUPY.replace("2.f *", "2.f **"))
    editor.watch("toy.cupy")
    state, _, below = editor.verdict(1)
    line = CUPY.splitlines().index("  y[i] = 2.f * x[i];") + 1
    assert state == "does not compile"
    assert f"toy/cupy.py({line}): error: operand of" in below

    editor.save("cupy.py", CUPY)
    assert editor.verdict(2)[0] == "compiled"
    editor.save("cupy.py", CUPY.replace("x[i];", "x[i] + sinf(x[i] * 1e9f);"))
    state, seconds, below = editor.verdict(3)
    assert state == "compiled"
    assert re.search(r"registers \d+ \(\+\d+\)", below)
    assert re.search(r"SASS \d+ B \(\+\d+ B\)", below)
    assert seconds < 10  # under 1.5 s on a quiet machine
    assert editor.end() == 0


@pytest.mark.slow
@pytest.mark.nvcc
def test_a_cuda_kernel(editor: Editor) -> None:
    editor.save("cuda.cu", CUDA)
    editor.watch("toy.cuda", timeout=60)
    assert editor.verdict(1)[0] == "compiled"
    editor.save("cuda.cu", CUDA.replace("2.f * x[i]", "2.f * x[j]"))
    state, _, below = editor.verdict(2)
    line = CUDA.splitlines().index("  y[i] = 2.f * x[i];") + 1
    assert state == "does not compile"
    assert f'toy/cuda.cu({line}): error: identifier "j" is undefined' in below
    editor.save("cuda.cu", CUDA.replace("2.f * x[i]", "x[i] + x[i]"))
    state, seconds, _ = editor.verdict(3)
    assert state == "compiled"
    assert seconds < 60  # under 8 s on a quiet machine
    assert editor.end() == 0


def test_what_cannot_be_watched_is_one_line() -> None:
    for k, message in {
        None: "make watch K=",
        "gemn": "no operation 'gemn'; there are: gemm",
        "gemm.tritn": "no backend 'tritn'; there are: ",
    }.items():
        with pytest.raises(WorkspaceError, match=message):
            watch.run(k)
    with pytest.raises(WorkspaceError, match=r"ARCH=sm_90 is not an architecture"):
        watch.run("gemm", "sm_90")
    with pytest.raises(WorkspaceError, match=r"TIMEOUT=soon"):
        watch.run("gemm", None, "soon")
