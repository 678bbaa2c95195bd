# SPDX-License-Identifier: Apache-2.0
"""make watch, driven as by an editor: files are saved in a copy of the package, verdicts read."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from custom_kernels import paths

from tests.kernels.toy import files as toy_files
from workspace import verbs
from workspace.host.errors import WorkspaceError
from workspace.host.options import read
from workspace.host.paths import ROOT
from workspace.watch import loop

TRITON = """
import triton
import triton.language as tl
import torch
from custom_kernels.operation import Specialization


@triton.jit
def double(x, y, K: tl.constexpr):
    row = tl.program_id(0) * K
    columns = tl.arange(0, K)
    tl.store(y + row + columns, tl.load(x + row + columns) * FACTOR)


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

VERDICT = re.compile(r"^\[(\d+)\] toy\.(\w+): ([a-z ]+?)(?: \(.*\))?, ([\d.]+) s$\n", re.MULTILINE)
HANGS = 15
"""Seconds after which a check is ended; on a quiet machine it takes less than one."""


class Editor:
    """A copy of the package with an operation of its own, and a watch over its backends."""

    def __init__(self, folder: Path) -> None:
        self.package = folder / "copy" / "custom_kernels"
        shutil.copytree(
            paths.PACKAGE,
            self.package,
            ignore=lambda _, names: [
                name
                for name in names
                if name == "__pycache__" or (paths.PACKAGE / name / "reference.py").is_file()
            ],
        )
        for name, text in {
            **toy_files((1, 3), 64),
            # The one for CuPy does not compile at first.
            "triton.py": TRITON, "cupy.py": CUPY.replace("2.f *", "2.f **"), "cuda.cu": CUDA,
        }.items():  # fmt: skip
            self.save(name, text)
        program = (
            "import sys; from workspace import verbs; from workspace.watch import loop\n"
            "loop.run(verbs.Watch(k='toy', timeout=int(sys.argv[1])))"
        )
        started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(HANGS)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(folder / "copy"), str(ROOT)]),
                "CUSTOM_KERNELS_CACHE": str(folder / "cache"),
                "TRITON_CACHE_DIR": str(folder / "triton"),
            },
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.shown = ""
        while "watching toy.cuda, toy.cupy, toy.triton for" not in self.shown:
            self.read()
        self.start_up = time.monotonic() - started

    def save(self, name: str, text: str) -> None:
        """As editors do: beside, then renamed."""
        path = self.package / "toy" / name
        path.parent.mkdir(exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(text)
        beside.replace(path)

    def read(self) -> None:
        """Wait for what is written next. A verdict is written at once, with the lines below it."""
        assert self.process.stdout is not None
        written = os.read(self.process.stdout.fileno(), 1 << 16)
        assert written, self.shown
        self.shown += written.decode()

    def verdict(self, backend: str, number: int) -> tuple[str, float, str]:
        """State, seconds and the lines below of a backend's verdict; waits for it."""
        while True:
            found = list(VERDICT.finditer(self.shown))
            ends = [one.start() for one in found[1:]] + [len(self.shown)]
            for one, end in zip(found, ends[: len(found)], strict=True):
                if (one[2], one[1]) == (backend, str(number)):
                    return one[3], float(one[4]), self.shown[one.end() : end]
            self.read()


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    """One watch for all tests here: each saves another backend. Ctrl-C ends it."""
    made = Editor(tmp_path_factory.mktemp("editor"))
    yield made
    made.process.send_signal(signal.SIGINT)
    assert made.process.wait() == 0


@pytest.mark.slow
def test_a_triton_kernel_through_a_morning(editor: Editor) -> None:
    state, _, below = editor.verdict("triton", 1)
    assert state == "right", below
    assert "registers" in below

    editor.save("triton.py", TRITON.replace("tl.constexpr(2.0)", "tl.constexpr(3.0)"))
    state, _, below = editor.verdict("triton", 2)
    assert state == "wrong"
    assert "M=1: error 5.0e-01, 1.0e-06 is allowed; first at output[0, 0]" in below

    editor.save("triton.py", TRITON.replace("tl.load(x", "tl.fetch(x"))
    state, _, below = editor.verdict("triton", 3)
    line = TRITON.splitlines().index(
        "    tl.store(y + row + columns, tl.load(x + row + columns) * FACTOR)"
    )
    assert state == "does not compile"
    assert f"toy/triton.py:{line + 1}: " in below
    assert "fetch" in below

    editor.save(
        "triton.py", TRITON.replace("    y = torch", "    import os; os.abort()\n    y = torch")
    )
    state, _, below = editor.verdict("triton", 4)
    assert state == "crashed"
    assert "Aborted" in below

    editor.save("triton.py", TRITON.replace("    y = torch", "    while True: pass\n    y = torch"))
    assert editor.verdict("triton", 5)[0] == "hangs"

    editor.save("triton.py", "import triton\ndef run(x:\n")
    state, _, below = editor.verdict("triton", 6)
    assert state == "does not compile"
    assert "line 2" in below

    editor.save(
        "triton.py",
        TRITON.replace(
            "tl.load(x + row + columns)", "tl.load(x + row + columns // 2 * 2 + columns % 2)"
        ),
    )
    state, seconds, _ = editor.verdict("triton", 7)
    assert state == "right"
    assert seconds < editor.start_up  # what takes long is imported once


@pytest.mark.slow
def test_a_cupy_kernel_and_one_that_does_not_compile_at_first(editor: Editor) -> None:
    state, _, below = editor.verdict("cupy", 1)
    line = CUPY.splitlines().index("  y[i] = 2.f * x[i];") + 1
    assert state == "does not compile"
    assert f"toy/cupy.py({line}): error: operand of" in below

    editor.save("cupy.py", CUPY)
    assert editor.verdict("cupy", 2)[0] == "compiled"
    editor.save("cupy.py", CUPY.replace("x[i];", "x[i] + sinf(x[i] * 1e9f);"))
    state, seconds, below = editor.verdict("cupy", 3)
    assert state == "compiled"
    assert re.search(r"registers \d+ \(\+\d+\)", below)
    assert re.search(r"SASS \d+ B \(\+\d+ B\)", below)
    assert seconds < editor.start_up


@pytest.mark.slow
@pytest.mark.nvcc
def test_a_cuda_kernel(editor: Editor) -> None:
    assert editor.verdict("cuda", 1)[0] == "compiled"
    editor.save("cuda.cu", CUDA.replace("2.f * x[i]", "2.f * x[j]"))
    state, _, below = editor.verdict("cuda", 2)
    line = CUDA.splitlines().index("  y[i] = 2.f * x[i];") + 1
    assert state == "does not compile"
    assert f'toy/cuda.cu({line}): error: identifier "j" is undefined' in below
    editor.save("cuda.cu", CUDA.replace("2.f * x[i]", "x[i] + x[i]"))
    assert editor.verdict("cuda", 3)[0] == "compiled"


def test_what_cannot_be_watched_is_one_line() -> None:
    for k, message in {
        None: "make watch K=",
        "gemn": "no operation 'gemn'; there are: gemm",
        "gemm.tritn": "no backend 'tritn'; there are: ",
    }.items():
        with pytest.raises(WorkspaceError, match=message):
            loop.run(verbs.Watch(k=k))
    with pytest.raises(WorkspaceError, match=r"ARCH=sm_90 is not an architecture"):
        loop.run(verbs.Watch(k="gemm", arch="sm_90"))
    with pytest.raises(WorkspaceError, match=r"TIMEOUT=soon is not a number"):
        read(verbs.Watch, {"K": "gemm", "TIMEOUT": "soon"})
