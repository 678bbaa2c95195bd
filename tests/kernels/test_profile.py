# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.profile``: which call is profiled, and what ncu said of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from custom_kernels import profile
from custom_kernels.command import UsageError
from custom_kernels.gemm import cases
from rich.console import Console

RAW = Path(__file__).parent / "data" / "ncu_raw_h200.csv"
"""Columns of ncu 2025.3's raw page for gemm.cublaslt at M=2048 N=1152 K=896 on an H200."""


def test_the_key_figures_of_a_real_report() -> None:
    (found,) = profile.parse("==PROF== Connected\n" + RAW.read_text())
    assert found.kernel.startswith("nvjet_sm90_tst_128x160")
    assert found.microseconds == pytest.approx(10.464)
    assert found.dram_percent == pytest.approx(11.46)
    assert found.sm_percent == pytest.approx(43.18)
    assert found.tensor_percent == pytest.approx(61.67)
    assert found.occupancy == pytest.approx(14.48)
    assert found.occupancy_limit == pytest.approx(18.75)
    assert found.registers == 168
    assert found.shared_bytes == 201_916
    names = [name for name, _ in found.stalls]
    assert names[:3] == ["long scoreboard", "barrier", "no instruction"]
    assert "selected" not in names
    shares = [share for _, share in found.stalls]
    assert shares[0] == pytest.approx(100 * 5.39 / 16.1, abs=1)  # of 16.10 in all, by ncu
    assert shares == sorted(shares, reverse=True)


def test_what_ncu_did_not_count_is_said_to_be_missing() -> None:
    raw = '"ID","Kernel Name","gpu__time_duration.sum"\n"","","ns"\n"0","mine","n/a"\n'
    (found,) = profile.parse(raw)
    assert found.microseconds is found.tensor_percent is found.registers is None
    assert found.stalls == ()
    console = Console(width=160)
    with console.capture() as capture:
        console.print(profile.table([found]))
    assert "n/a" in capture.get()


def test_a_report_without_a_kernel_has_no_profile() -> None:
    assert profile.parse("==WARNING== No kernels were profiled.\n") == []


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("==PROF== Connected\nerror: no backend x\n==ERROR== exited\n", "no backend x"),
        (
            "==PROF== Connected\n==ERROR== Failed to find metric\n",
            "==ERROR== Failed to find metric",
        ),
        ("something\nlast words\n\n", "last words"),
        ("", "no output"),
    ],
)
def test_the_line_that_says_most_is_the_reason(output: str, reason: str) -> None:
    assert profile._reason(output) == reason


@pytest.mark.parametrize(
    ("arguments", "labels"),
    [
        ([], {"model": "qwen2.5-7b", "layer": "qkv", "M": 4096}),
        (
            ["--model", "qwen2.5-0.5b", "--layer", "down", "--tokens", "7"],
            {"model": "qwen2.5-0.5b", "layer": "down", "M": 7},
        ),
    ],
)
def test_one_case_is_chosen(arguments: list[str], labels: dict[str, object]) -> None:
    options = profile._parser().parse_args(["gemm", *arguments])
    case = profile.case_of(options, cases)
    assert labels.items() <= case.labels.items()
    # The process that is profiled chooses the same one.
    child = profile._parser().parse_args(profile._child(options))
    assert child.child
    assert profile.case_of(child, cases).labels == case.labels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "x"], "no model x; known: qwen2.5-0.5b"),
        (["--layer", "x"], "no layer x; known: qkv, o, gate_up, down, lm_head"),
        (["--pattern", "6:8"], "no pattern 6:8; known: none"),
        (["--dtype", "int4"], "no dtype int4; known: bfloat16, float16"),
    ],
)
def test_a_case_that_is_not_there_is_said_with_those_that_are(
    arguments: list[str], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        profile.case_of(profile._parser().parse_args(["gemm", *arguments]), cases)
    assert message in str(caught.value)


def test_ncu_is_taken_from_its_variable_path_or_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "ncu"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.delenv("NCU", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(profile, "INSTALLED", ())
    with pytest.raises(UsageError, match=r"ncu\) is not on PATH: install"):
        profile.find_ncu()
    monkeypatch.setattr(profile, "INSTALLED", (str(tmp_path / "*" / "ncu"),))
    assert profile.find_ncu() == str(program)
    monkeypatch.setenv("PATH", str(program.parent))
    assert profile.find_ncu() == str(program)
    monkeypatch.setenv("NCU", str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match=r"NCU=.*nothing is not a program"):
        profile.find_ncu()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo '==ERROR== ERR_NVGPUCTRPERM: no permission'; exit 1", "hardware counters from this"),
        ("echo 'error: no backend x' >&2; exit 1", "ncu failed: no backend x"),
        ("echo finished", "ncu failed: finished"),  # no report, whatever the status
    ],
)
def test_a_failure_of_ncu_is_one_line(tmp_path: Path, script: str, message: str) -> None:
    program = tmp_path / "ncu"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    with pytest.raises(UsageError, match=message) as caught:
        profile.run_ncu(str(program), tmp_path / "a.ncu-rep", ["true"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("container", [True, False])
@pytest.mark.parametrize("root", [True, False])
def test_the_remedy_for_refused_counters_is_one_that_helps_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: bool, root: bool
) -> None:
    program = tmp_path / "ncu"
    program.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'\n")
    program.chmod(0o755)
    mark = tmp_path / "containerenv"
    monkeypatch.setattr(profile, "CONTAINER_MARKS", (str(mark),))
    monkeypatch.setattr(profile.os, "geteuid", lambda: 0 if root else 1000)
    if container:
        mark.touch()
    with pytest.raises(UsageError, match="NVreg_RestrictProfilingToAdminUsers=0") as caught:
        profile.run_ncu(str(program), tmp_path / "a.ncu-rep", ["true"])
    told = str(caught.value)
    # The option counts for all; a capability only in a container, and there only for root; sudo
    # only where root has what the user lacks.
    assert ("--cap-add=SYS_ADMIN" in told and "on the host" in told) is container
    assert ("profile as root in it" in told) is (container and not root)
    assert ("sudo" in told) is (not container and not root)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_what_to_run_instead() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "custom_kernels.profile", "gemm"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: profiling needs a GPU and torch sees none; without one, `make inspect K=gemm` "
        "shows registers, occupancy and instructions\n"
    )


@pytest.mark.gpu
def test_kernels_of_a_notebook_are_profiled_in_their_order(tmp_path: Path) -> None:
    cupy = pytest.importorskip("cupy")
    try:
        profile.find_ncu()
    except UsageError as error:
        pytest.skip(str(error))
    source = (
        'extern "C" __global__ void {}(float* y) {{ y[blockIdx.x * 32 * {} + threadIdx.x] = 1; }}'
    )
    launches = [
        profile.Launch(
            cupy.RawKernel(source.format(name, stride), name), (64,), (32,), (torch.empty(4096),)
        )
        for name, stride in (("first", 1), ("second", 2))
    ]
    found = profile.of_launches(launches, tmp_path / "a.ncu-rep")
    assert [one.kernel for one in found] == ["first", "second"]
    assert [one.store_sectors for one in found] == [4, 4]
    profile.write(tmp_path / "a.json", {"x": found[0]}, "make test")
    assert profile.read(tmp_path / "a.json").profiles == {"x": found[0]}


@pytest.mark.gpu
def test_only_the_profiled_kernel_is_in_the_report(tmp_path: Path) -> None:
    try:
        profile.find_ncu()
    except UsageError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-m", "custom_kernels.profile", "gemm", "--backend", "reference",
         "--model", "qwen2.5-0.5b", "--layer", "o", "--tokens", "256", "--output", str(tmp_path)],
        capture_output=True, text=True, check=False, env=dict(os.environ),
    )  # fmt: skip
    if "keeps the hardware counters for root" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert "profiling gemm.reference at qwen2.5-0.5b o M=256 N=896 K=896" in done.stdout
    assert "normal" not in done.stdout  # torch's kernel that fills with random numbers
    assert len(list(tmp_path.glob("*.ncu-rep"))) == 1
