# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.sanitize``: what the tools wrote, and planted faults they find."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_kernels import sanitize
from custom_kernels.command import UsageError
from custom_kernels.sanitize import Finding, Job, Report, Run
from rich.console import Console

from tests.kernels.conftest import PackageCopy, copy_package
from tests.kernels.toy import files as toy_files

# Lines as NVIDIA's manual of Compute Sanitizer shows them, not of a run.
MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at past_the_end(const float *, float *, int)+0xd0 in past.cu:9
=========     by thread (0,0,0) in block (1,0,0)
=========     Access to 0x7f241b000400 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f241b000000 of size 1,024 bytes
=========
========= Invalid __shared__ read of size 8 bytes
=========     at void inner<float>(float *)+0x50
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x401 is misaligned
=========     Device Frame: outer(float *)+0x30 in past.cu:44
=========
========= Invalid __global__ write of size 4 bytes
=========     at past_the_end(const float *, float *, int)+0xd0 in past.cu:9
=========     by thread (0,0,0) in block (3,0,0)
=========     Access to 0x7f241b000c00 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f241b000000 of size 3,072 bytes
=========
========= ERROR SUMMARY: 1,003 errors
========= ERROR SUMMARY: 1,000 errors were not printed. Use --print-limit option to adjust the \
number of printed errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at race+0x90 in race.cu:41
=========     and Read access at race+0x100 in race.cu:51 [508 hazards]
=========
========= Error: Race reported between Write access at race+0x90 in race.cu:41
=========     and Read access at race+0x100 in race.cu:51 [16 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
CLEAN = """\
========= COMPUTE-SANITIZER
========= {} SUMMARY: 0 {}
"""


def run_of(log: str, *, tool: str = "memcheck", right: bool = True, output: str = "") -> Run:
    report = sanitize.parse(log)
    return Run(Job("toy.mine", tool), report, right, output, 1.0, Path("nowhere.log"))


def test_an_error_is_one_sentence_and_counted_by_place() -> None:
    report = sanitize.parse("1 of 1 cases right\n" + MEMCHECK)
    assert report.errors == 1003
    assert report.remarks == ()
    assert list(map(str, report.findings)) == [
        "Invalid __global__ write of size 4 bytes at past_the_end(const float *, float *, int)"
        "+0xd0 in past.cu:9 by thread (0,0,0) in block (1,0,0): Access to 0x7f241b000400 is out of "
        "bounds and is 1 bytes after the nearest allocation at 0x7f241b000000 of size 1,024 bytes "
        "(2 times)",
        "Invalid __shared__ read of size 8 bytes at void inner<float>(float *)+0x50 by thread "
        "(3,0,0) in block (0,0,0): Address 0x401 is misaligned, called from outer(float *)+0x30 in "
        "past.cu:44",
    ]


def test_a_race_names_both_accesses() -> None:
    report = sanitize.parse(RACECHECK)
    assert report == Report(
        2,
        (
            Finding(
                "Error: Race reported between Write access at race+0x90 in race.cu:41 and Read "
                "access at race+0x100 in race.cu:51 [508 hazards]",
                2,
            ),
        ),
    )


@pytest.mark.parametrize(
    ("log", "tool", "right", "verdict"),
    [
        (CLEAN.format("ERROR", "errors"), "memcheck", True, "clean"),
        (
            CLEAN.format("RACECHECK", "hazards displayed (0 errors, 0 warnings)"),
            "racecheck", True, "clean",
        ),
        (CLEAN.format("ERROR", "errors"), "memcheck", False, "wrong result"),
        (MEMCHECK, "memcheck", True, "1,003 errors"),
        (MEMCHECK.partition("========= ERROR")[0], "memcheck", False, "3 errors"),  # killed
        (RACECHECK, "racecheck", True, "2 hazards"),
        (
            CLEAN.format("ERROR", "errors") + "========= Internal Sanitizer Error: no memory\n",
            "initcheck", True, "incomplete",
        ),
        (
            "========= COMPUTE-SANITIZER\n========= Error: Device not supported.\n",
            "synccheck", True, "no result",
        ),
        ("", "memcheck", True, "no result"),
    ],
)  # fmt: skip
def test_only_a_watched_check_that_was_right_is_clean(
    log: str, tool: str, right: bool, verdict: str
) -> None:
    assert run_of(log, tool=tool, right=right).verdict == verdict


def test_the_screen_shows_a_table_and_what_was_found() -> None:
    runs = [
        run_of(MEMCHECK),
        run_of(
            CLEAN.format("RACECHECK", "hazards displayed (0 errors, 0 warnings)"), tool="racecheck"
        ),
        run_of("", tool="synccheck", output="\n".join("abcd")),
    ]
    screen = Console(width=100)
    with screen.capture() as capture:
        screen.print(sanitize.table(runs))
        for run in runs:
            sanitize.explain(run, screen)
    lines = [line.split() for line in capture.get().splitlines()]
    assert ["kernel", "memcheck", "racecheck", "synccheck"] in lines
    assert ["toy.mine", "1,003", "errors", "clean", "no", "result"] in lines
    shown = capture.get()
    assert "toy.mine, memcheck: 1,003 errors\n  Invalid __global__ write" in shown
    assert "toy.mine, racecheck" not in shown
    assert "toy.mine, synccheck: no result\n  b\n  c\n  d\n" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["silu_and_mul", "--tool", "memcheck,leakcheck"], "no tool leakcheck; known: memcheck, "),
        (
            ["silu_and_mul"],
            "Compute Sanitizer needs a GPU and torch sees none; without one, `make ",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sanitize.main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {message}")
    assert shown.err.count("\n") == 1


def test_without_the_tool_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COMPUTE_SANITIZER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitize, "INSTALLED", ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sanitize.main(["silu_and_mul"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: Compute Sanitizer (compute-sanitizer) was not found: ")
    assert shown.count("\n") == 1


CUDA = """
#define KERNEL "toy"
#include "include/launch.cuh"
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

__global__ void past_the_end(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) y[i] = i < n ? 2 * x[i] : 0;
}

void toy(tvm::ffi::TensorView x, tvm::ffi::TensorView y) {
  const int n = x.size(0) * x.size(1), device = x.device().device_id;
  custom_kernels::DeviceGuard on(device);
  past_the_end<<<n / 256 + 1, 256, 0, custom_kernels::current_stream(device)>>>(
      static_cast<const float*>(x.data_ptr()), static_cast<float*>(y.data_ptr()), n);
  CHECK_CUDA(cudaGetLastError());
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(toy, toy);
"""
# A block has a row of 256 values.
CUPY = '''
import cupy
import torch
from custom_kernels.toy import empty_output

KERNEL = cupy.RawKernel(r"""
extern "C" __global__ void {name}(const float* x, float* y) {{
  __shared__ float tile[256];
  const int i = threadIdx.x, row = 256 * blockIdx.x;
  {body}
}}
""", "{name}")


def run(x):
    y = empty_output(x)
    with cupy.cuda.ExternalStream(torch.cuda.current_stream(x.device).cuda_stream):
        KERNEL((x.shape[0],), (256,), (x.data_ptr(), y.data_ptr()))
    return y
'''
SHARED = """
  tile[i] = x[row + i];
  __syncthreads();
  y[row + 255 - i] = 2 * tile[255 - i];
"""
TRITON = """
import torch
import triton
import triton.language as tl
from custom_kernels.toy import empty_output


@triton.jit
def {name}(x, scratch, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = 2 * tl.load(x + i, mask=i < n, other=0)
    value += 0.0 * tl.load(scratch + i, mask=i < n, other=0)
    tl.store(y + i, value, mask=i < n)


def run(x):
    y, scratch = empty_output(x), torch.zeros_like(x)
    {name}[(triton.cdiv(x.numel(), 512),)](x, scratch, y, x.numel(), BLOCK=512)
    return y
"""

FAULTS = {
    # Backend: its file and kernel, right; what is put in place of what; the tool and what it says.
    "past": (
        "past.cu", CUDA, "past_the_end",
        ("if (i < n) y[i] = 2 * x[i];", "if (i <= n) y[i] = i < n ? 2 * x[i] : 0;"),
        "memcheck", "Invalid __global__ write of size 4 bytes",
    ),
    "outside": (
        "outside.py", CUPY, "outside_of_shared",
        ("2 * tile[255 - i]", "2 * tile[255 - i + 64 * 256 * gridDim.x]"),
        "memcheck", "Invalid __shared__ read of size 4 bytes",
    ),
    "unmasked": (
        "unmasked.py", TRITON, "store_without_mask",
        ("tl.store(y + i, value, mask=i < n)", "tl.store(y + i, value)"),
        "memcheck", "Invalid __global__ write of size",
    ),
    "race": (
        "race.py", CUPY, "no_barrier", ("  __syncthreads();\n", ""),
        "racecheck", "Race reported between Write access",
    ),
    "early": (
        "early.py", TRITON, "reads_too_early", ("torch.zeros_like(x)", "torch.empty_like(x)"),
        "initcheck", "Uninitialized __global__ memory read of size",
    ),
    "divergent": (
        "divergent.py", CUPY, "not_all_arrive",
        ("__syncthreads();", "if (i % 32 < 20) __syncthreads();"),
        "synccheck", "Barrier error detected",
    ),
}  # fmt: skip
"""Five kinds of faults in CUDA C++, CuPy and Triton."""

PROGRAM = """
import dataclasses, json, pathlib, sys
from custom_kernels import sanitize
jobs = [sanitize.Job(*job) for job in json.loads(sys.argv[1])]
runs = sanitize.run_all(jobs, ["--quick"], pathlib.Path(sys.argv[2]), 120)
found = [dataclasses.asdict(run) | {"verdict": run.verdict} for run in runs]
print(json.dumps({run["job"]["kernel"]: run for run in found}, default=str))
"""


def plant(copy: PackageCopy) -> list[Job]:
    """An operation whose backends have the faults, and the same ones without, `…_right`."""
    for name, text in toy_files((1, 3), 256).items():
        copy.add(f"toy/{name}", text)
    jobs: list[Job] = []
    for backend, (file, source, kernel, (right, wrong), tool, _) in FAULTS.items():
        suffix = Path(file).suffix
        text = source.replace(FAULTS["past"][3][1], FAULTS["past"][3][0])
        text = text.format(name=kernel, body=SHARED) if suffix == ".py" else text
        assert right in text
        copy.add(f"toy/{backend}_right{suffix}", text)
        copy.add(f"toy/{backend}{suffix}", text.replace(right, wrong))
        jobs += [Job(f"toy.{backend}_right", tool), Job(f"toy.{backend}", tool)]
    return jobs


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What became of a backend of ``plant``; all of them run once."""
    try:
        sanitize.find_sanitizer()
    except UsageError as error:
        pytest.skip(str(error))
    copy = copy_package(tmp_path_factory.mktemp("sanitize"))
    jobs = json.dumps([[job.kernel, job.tool] for job in plant(copy)])
    done = copy.python("-c", PROGRAM, jobs, str(copy.root / "logs"))
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout.splitlines()[-1])
    return lambda backend: runs[f"toy.{backend}"]


@pytest.mark.gpu
@pytest.mark.nvcc
@pytest.mark.parametrize("backend", FAULTS)
def test_a_planted_fault_is_found_and_the_kernel_without_it_is_clean(
    watched: Callable[[str], dict[str, Any]], backend: str
) -> None:
    *_, kernel, _, _, said = FAULTS[backend]
    right = watched(f"{backend}_right")
    assert right["verdict"] == "clean", right
    found = watched(backend)
    assert found["report"]["errors"], found
    texts = [finding["text"] for finding in found["report"]["findings"]]
    assert any(said in text and kernel in text for text in texts), texts
    if backend == "past":
        assert any("past.cu:9" in text for text in texts), texts


def test_a_job_is_the_check_of_one_kernel_under_one_tool(
    package_copy: PackageCopy, tmp_path: Path
) -> None:
    """With a program in place of Compute Sanitizer that writes a log and then runs the rest."""
    plant(package_copy)
    package_copy.add("toy/wrong.py", "def run(x):\n    return 3 * x\n")
    program, logs = tmp_path / "program", tmp_path / "logs"
    program.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != "--log-file" ]; do shift; done\n'
        f"cat > \"$2\" <<'END'\n{CLEAN.format('ERROR', 'errors')}END\n"
        f'while [ "$1" != "{sys.executable}" ]; do shift; done\n'
        'exec "$@"\n'
    )
    program.chmod(0o755)
    jobs = json.dumps([["toy.reference", "memcheck"], ["toy.wrong", "initcheck"]])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, jobs, str(logs)],
        env=package_copy.environment() | {"COMPUTE_SANITIZER": str(program)},
        cwd=package_copy.root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)
    verdicts = {kernel: run["verdict"] for kernel, run in runs.items()}
    assert verdicts == {"toy.reference": "clean", "toy.wrong": "wrong result"}
    assert ": 2 of 2 cases right" in runs["toy.reference"]["output"]
    assert "M=3: error" in runs["toy.wrong"]["output"]
    names = sorted(path.name for path in logs.iterdir())
    assert names == ["sanitize-toy.reference-memcheck.log", "sanitize-toy.wrong-initcheck.log"]


def test_a_percent_sign_in_a_path_is_one_for_compute_sanitizer() -> None:
    words = sanitize.watched("program", Job("toy.mine", "memcheck"), Path("100%/a.log"), [])
    assert words[words.index("--log-file") + 1] == "100%%/a.log"


def test_what_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    words = ["sh", "-c", f"sleep 600 & echo $! > '{pid}'; wait"]
    said = sanitize._Processes(2).output(words)
    assert said == "it did not end within 2 s"
    for _ in range(300):  # a signal takes its time
        if not is_alive(int(pid.read_text())):
            return
        time.sleep(0.1)
    pytest.fail("what it started is still there")


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
