# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.profile``: which call is profiled, what ncu said of it, what is
shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from custom_kernels import paths, profile
from custom_kernels.bench.record import Provenance
from custom_kernels.command import UsageError
from custom_kernels.profile import __main__ as command_line
from custom_kernels.profile import figures, ncu, profiled, records, source, text
from custom_kernels.profile.choice import Choice
from rich.console import Console

if TYPE_CHECKING:
    from rich.console import RenderableType

ROOT = paths.checkout()
RAW = Path(__file__).parent / "data" / "ncu_raw_h200.csv"
"""Columns of ncu 2025.3's raw page for gemm.cublaslt at M=2048 N=1152 K=896 on an H200."""
LAUNCHES = """\
"ID","Kernel Name","Block Size","Grid Size","gpu__time_duration.sum",\
"launch__occupancy_limit_blocks","launch__occupancy_limit_registers",\
"launch__occupancy_limit_shared_mem","launch__occupancy_limit_warps",\
"launch__waves_per_multiprocessor","smsp__issue_inst0.avg.pct_of_peak_sustained_active",\
"sm__cycles_elapsed.avg.per_second"
"","","","","ns","block","block","block","block","","%","cycle/second"
"0","first","(448, 1, 1)","(4096, 1, 1)","12,345","32","4","12","4","7.76","71.25","1,755,000,000"
"1","second","(32, 8, 1)","(64, 32, 1)","2,000","32","16","2","8","0.50","93.00","1,980,000,000"
"""
"""Two launches, in the form of the raw page."""
HEADER = """\
"Line No","Source","Address","Source","Warp Stall Sampling (All Samples)","# Samples",\
"stall_barrier","stall_long_sb","stall_not_selected","stall_selected","stall_barrier (Not Issued)"
"""
SOURCE = f"""\
"File Path","{ROOT}/kernels/custom_kernels/rms_norm/cuda.cu"
"Function Name","first"
{HEADER}\
"0","","-","-","315","315","10","300","0","5","2"
"","","0x7f00","      LDG.E.128 R4, [R2] ","315","315","10","300","0","5","2"
"7","  v[n] = load(row, n);\r","-","-","315","315","10","300","0","5","2"
"","","0x7f00","      LDG.E.128 R4, [R2] ","315","315","10","300","0","5","2"
"9","  __syncthreads();","-","-","1050","1050","1030","0","15","5","900"
"","","0x7f10","      BAR.SYNC.DEFER_BLOCKING 0x0 ","1050","1050","1030","0","15","5","900"
"","","...","...","-","-","-","-","-","-","-"
"11","  y[i] = f(v[0]);","-","-","60","60","0","60","0","0","0"
"","","0x7f20","      FMUL R4, R4, R5 ","60","60","0","60","0","0","0"
"12","}}","-","-","9","9","0","0","4","5","0"
"","","0x7f30","      EXIT ","9","9","0","0","4","5","0"
"File Path","{ROOT}/kernels/custom_kernels/include/vectors.cuh"
"Function Name","first"
{HEADER}\
"7",": "=r"(a[i]),"=r"(b) : "l"(from));","-","-","315","315","10","300","0","5","2"
"","","0x7f00","      LDG.E.128 R4, [R2] ","315","315","10","300","0","5","2"
"File Path","{ROOT}/.workspace/system/include/cuda_bf16.hpp"
"Function Name","first"
{HEADER}\
"3","<Unable to open source file>","-","-","60","60","0","60","0","0","0"
"","","0x7f20","      FMUL R4, R4, R5 ","60","60","0","60","0","0","0"
"""
"""The source page of one launch, in the form in which ncu 2025.3 wrote it on an H200: quotes are as
they are in the source, and an inlined instruction is listed in its file and where it is called."""


def shown(item: RenderableType, width: int = 140) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(item)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def some(**more: Any) -> profile.Profile:
    (found,) = figures.parse(RAW.read_text())
    return replace(found, **more)


# --- what ncu wrote -------------------------------------------------------------------------------


def test_the_key_figures_of_a_real_report() -> None:
    (found,) = figures.parse("==PROF== Connected\n" + RAW.read_text())
    assert found.kernel.startswith("nvjet_sm90_tst_128x160")
    assert (found.grid, found.block) == ("1 x 117", "384")
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


def test_what_a_launch_takes_and_what_keeps_more_blocks_from_an_sm() -> None:
    first, second = figures.parse(LAUNCHES)
    assert (first.grid, first.block, first.waves) == ("4096", "448", 7.76)
    assert (second.grid, second.block) == ("64 x 32", "32 x 8")
    assert first.limited_by == ("registers", "threads per block")
    assert second.limited_by == ("shared memory",)
    assert first.no_eligible_percent == 71.25
    assert (first.microseconds, first.sm_mhz) == pytest.approx((12.345, 1755))


def test_what_ncu_did_not_count_is_said_to_be_missing() -> None:
    raw = '"ID","Kernel Name","gpu__time_duration.sum"\n"","","ns"\n"0","mine[1]","n/a"\n'
    (found,) = figures.parse(raw)
    assert found.microseconds is found.tensor_percent is found.registers is found.grid is None
    assert found.stalls == ()
    assert "mine[1]" in shown(profile.table([found]))
    assert "n/a" in shown(profile.table([found]))
    assert "grid n/a, block n/a" in shown(profile.report(found))
    assert profile.bound(found) == "ncu counted too little to say what bounds the kernel"


def test_a_report_without_a_kernel_has_no_profile() -> None:
    assert figures.parse("==WARNING== No kernels were profiled.\n") == []


def test_source_lines_come_in_the_order_of_their_stalls_over_all_files() -> None:
    found = source.parse(SOURCE)
    # Of 1400 stalls: a warp that issued, or could have, did not stall.
    shares = [round(line.share * 14) for line in found]
    assert shares == [1030, 310, 310, 60, 60]
    assert [(line.file, line.number) for line in found] == [
        ("kernels/custom_kernels/rms_norm/cuda.cu", 9),
        ("kernels/custom_kernels/rms_norm/cuda.cu", 7),
        ("kernels/custom_kernels/include/vectors.cuh", 7),
        ("kernels/custom_kernels/rms_norm/cuda.cu", 11),
        ("cuda_bf16.hpp", 3),
    ]
    assert [line.reason for line in found] == ["barrier", *["long scoreboard"] * 4]
    assert [line.text for line in found] == [
        "__syncthreads();",
        "v[n] = load(row, n);",
        ': "=r"(a[i]),"=r"(b) : "l"(from));',
        "y[i] = f(v[0]);",
        "",  # ncu did not find the file
    ]


def test_no_more_than_ten_source_lines_are_shown() -> None:
    rows = [
        f'"{n}","x","-","-","{n}","{n}","{n}","0","0","0","0"\n'
        f'"","","0x{n}","NOP","{n}","{n}","{n}","0","0","0","0"\n'
        for n in range(10, 30)
    ]
    found = source.parse(HEADER + "".join(rows))
    assert [line.number for line in found] == [*range(29, 19, -1)]


def test_a_kernel_without_line_information_has_no_source_lines() -> None:
    page = "==WARNING== No lineinfo available to show CUDA-C source related to 'nvjet'.\n"
    assert source.parse(page) == ()
    assert "no source lines" in shown(profile.report(some()))


# --- what a person reads --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "compute", "sentence"),
    [
        ((84.2, 61, 30), 12, "memory-bound: DRAM is at 84 % of its peak throughput"),
        ((12, 88, 50), 7, "memory-bound: L2 is at 88 % of its peak throughput"),
        ((21, 20, 97), 70, "memory-bound: L1/shared is at 97 % of its peak throughput"),
        ((30, 61, 20), 85, "compute-bound: the SMs are at 85 % of their peak throughput"),
        (
            (59, 58, 30),
            59,
            "latency-bound: no unit reaches 60 % of its peak throughput; warps mostly wait for "
            "long scoreboard",
        ),
        ((None, None, 75), 20, "memory-bound: L1/shared is at 75 % of its peak throughput"),
        ((90, 90, 90), None, "ncu counted too little to say what bounds the kernel"),
    ],
)
def test_the_unit_nearest_to_its_peak_bounds_a_kernel_or_latency_does(
    levels: tuple[float | None, ...], compute: float | None, sentence: str
) -> None:
    dram, l2, l1 = levels
    one = some(dram_percent=dram, l2_percent=l2, l1_percent=l1, sm_percent=compute)
    assert profile.bound(one) == sentence


def test_a_profile_that_was_recorded_without_launch_and_lines_is_read_and_shown() -> None:
    assert ROOT is not None
    recorded = profile.read(ROOT / "benchmarks" / "profiles" / "notebook-h200.json")
    bounds = {name: profile.bound(one).partition(":")[0] for name, one in recorded.profiles.items()}
    assert bounds["polynomial"] == "compute-bound"
    assert bounds["copy, 16 bytes"] == bounds["direct"] == "memory-bound"
    assert bounds["copy, one block"] == bounds["rows of 33"] == "latency-bound"


def test_the_report_gives_figures_with_units_and_lines_with_their_place() -> None:
    first, _ = figures.parse(LAUNCHES)
    whole = replace(first, lines=source.parse(SOURCE), occupancy=80.0, occupancy_limit=87.5)
    report = " ".join(shown(profile.report(whole)).split())
    for part in (
        "duration 12.35 µs at an SM clock of 1755 MHz",
        "launch grid 4096 (7.76 waves), block 448",
        "occupancy 80.0 % of 87.5 % possible, limited by registers and threads per block",
        "latency in 71.2 % of cycles no warp could issue",
        "73.6 % barrier kernels/custom_kernels/rms_norm/cuda.cu:9 __syncthreads();",
        '22.1 % long scoreboard kernels/custom_kernels/include/vectors.cuh:7 : "=r"(a[i]),',
    ):
        assert part in report
    # What does not fit is cut from the code, not from the place.
    narrow = shown(profile.report(whole), width=80)
    assert "__syncthreads" not in narrow
    assert all(f"{line.file}:{line.number}" in narrow for line in whole.lines)


def test_two_profiles_are_compared_figure_by_figure() -> None:
    before = some(sm_mhz=1700.0, occupancy=None)
    now = replace(before, microseconds=9.4176, registers=160.0, sm_percent=43.2)
    lines = shown(profile.difference(before, now)).splitlines()
    rows = {line[:34].strip(): line[34:].split() for line in lines}
    assert rows["duration, µs"] == ["10.46", "9.42", "-10.0", "%"]
    assert rows["registers per thread"] == ["168", "160", "-8"]
    assert rows["SMs, % of peak"] == ["43.2", "43.2"]  # no change that shows
    assert rows["SM clock, MHz"] == ["1700", "1700"]
    assert "occupancy, %" not in rows


# --- the last one ---------------------------------------------------------------------------------


def recorded(device: str = "NVIDIA H200", source_hash: str = "a", **more: Any) -> profile.Recorded:
    provenance = Provenance(
        time="2026-11-27T12:00:00+00:00", command="x", device=device, kernel_source_hash=source_hash
    )
    return profile.Recorded(provenance=provenance, profiles={"1 gemm": some(**more)})


def test_the_last_profile_of_a_kernel_and_case_on_a_gpu_model_is_kept(tmp_path: Path) -> None:
    first = recorded()
    second = recorded(microseconds=5.0, lines=(profile.Line("a", 1, 2.5, "b", "c"),))
    assert records.exchange("gemm-triton M=16", first, tmp_path) is None
    assert records.exchange("gemm-triton M=16", second, tmp_path) == first
    assert records.exchange("gemm-triton M=17", first, tmp_path) is None
    other = recorded(device="NVIDIA H100")
    assert records.exchange("gemm-triton M=16", other, tmp_path) is None
    assert records.exchange("gemm-triton M=16", first, tmp_path) == second


def test_a_profile_of_another_version_is_said_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records.exchange("gemm", recorded(), tmp_path)
    (path,) = tmp_path.iterdir()
    for damaged in ("{", json.dumps({"profiles": {}}), "\xff"):
        path.write_text(damaged, encoding="latin-1")
        assert records.exchange("gemm", recorded(), tmp_path) is None
        assert f"{path} is no profile of this version" in caplog.text
        caplog.clear()
    assert records.exchange("gemm", recorded(), tmp_path) == recorded()


def test_it_is_said_whether_the_sources_changed_since_the_last_profile() -> None:
    now = recorded(microseconds=5.0)
    assert "no earlier profile" in shown(text.against(None, now))
    assert "the kernels' sources are the same" in shown(text.against(recorded(), now))
    changed = shown(text.against(recorded(source_hash="b"), now))
    assert "the profile of 2026-11-27T12:00:00+00:00: the kernels' sources changed" in changed
    assert "-52.2 %" in changed
    one = recorded()
    two = one.model_copy(update={"profiles": {**one.profiles, "2 add": some()}})
    assert "1 kernels then, 2 now: not compared" in shown(text.against(one, two))


def test_a_run_prints_itself_in_a_notebook_as_on_the_command_line() -> None:
    kernels = (some(), some(kernel="add[2]", lines=source.parse(SOURCE)))
    printed = shown(profile.Run(kernels, recorded(), recorded(source_hash="b"), Path("a.ncu-rep")))
    order = [
        "warps wait for",
        "latency-bound",
        "no source lines",
        "add[2]\n",
        "stalls by",
        "changed",
    ]
    places = [printed.index(part) for part in order]
    assert places == sorted(places)


# --- which call -----------------------------------------------------------------------------------


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
    def choice(words: list[str]) -> Choice:
        options = vars(command_line._parser().parse_args(words))
        return Choice(**{name: options[name] for name in vars(Choice("gemm"))})

    chosen = choice(["gemm", *arguments])
    assert labels.items() <= chosen.case().labels.items()
    # The process that is profiled chooses the same one.
    assert choice(chosen.words()) == chosen


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice("gemm", model="x"), "no model x; known: qwen2.5-0.5b"),
        (Choice("gemm", layer="x"), "no layer x; known: qkv, o, gate_up, down, lm_head"),
        (Choice("gemm", pattern="6:8"), "no pattern 6:8; known: none"),
        (Choice("gemm", dtype="int4"), "no dtype int4; known: bfloat16, float16"),
    ],
)
def test_a_case_that_is_not_there_is_said_with_those_that_are(choice: Choice, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        choice.case()
    assert message in str(caught.value)


# --- ncu ------------------------------------------------------------------------------------------


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


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
    assert ncu._reason(output) == reason


def test_ncu_is_taken_from_its_variable_path_or_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = program(tmp_path / "bin" / "ncu", "")
    monkeypatch.delenv("NCU", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(ncu, "INSTALLED", ())
    with pytest.raises(UsageError, match=r"ncu\) is not on PATH: install"):
        ncu.find()
    monkeypatch.setattr(ncu, "INSTALLED", (str(tmp_path / "*" / "ncu"),))
    assert ncu.find() == str(found)
    monkeypatch.setenv("PATH", str(found.parent))
    assert ncu.find() == str(found)
    monkeypatch.setenv("NCU", str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match=r"NCU=.*nothing is not a program"):
        ncu.find()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo '==ERROR== ERR_NVGPUCTRPERM: no permission'; exit 1", "hardware counters from this"),
        ("echo 'error: no backend x' >&2; exit 1", "ncu failed: no backend x"),
        ("echo finished", "ncu failed: finished"),  # no report, whatever the status
    ],
)
def test_a_failure_of_ncu_is_one_line(tmp_path: Path, script: str, message: str) -> None:
    failing = program(tmp_path / "ncu", script)
    with pytest.raises(UsageError, match=message) as caught:
        ncu.run(str(failing), tmp_path / "a.ncu-rep", ["true"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("container", [True, False])
@pytest.mark.parametrize("root", [True, False])
def test_the_remedy_for_refused_counters_is_one_that_helps_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: bool, root: bool
) -> None:
    refused = program(tmp_path / "ncu", "echo '==ERROR== ERR_NVGPUCTRPERM'")
    mark = tmp_path / "containerenv"
    monkeypatch.setattr(ncu, "CONTAINER_MARKS", (str(mark),))
    monkeypatch.setattr(ncu.os, "geteuid", lambda: 0 if root else 1000)
    if container:
        mark.touch()
    with pytest.raises(UsageError, match="NVreg_RestrictProfilingToAdminUsers=0") as caught:
        ncu.run(str(refused), tmp_path / "a.ncu-rep", ["true"])
    told = str(caught.value)
    # The option counts for all; a capability only in a container, and there only for root; sudo
    # only where root has what the user lacks.
    assert ("--cap-add=SYS_ADMIN" in told and "on the host" in told) is container
    assert ("profile as root in it" in told) is (container and not root)
    assert ("sudo" in told) is (not container and not root)


def test_each_launch_of_a_program_gets_its_own_source_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ncu is a script here, which runs the program and prints these pages."""
    (tmp_path / "raw").write_text(LAUNCHES)
    (tmp_path / "lines").write_text(SOURCE)
    script = f"""
    for word; do
      case $word in
        --import) reads=yes ;;
        --export=*) export=${{word#--export=}} ;;
        --page=raw) test "$LC_ALL" = C.UTF-8 && cat '{tmp_path}/raw'; exit ;;
        --launch-skip=1) cat '{tmp_path}/lines'; exit ;;
        --*) ;;
        *) test "$reads" || {{ "$word" && touch "$export"; exit; }} ;;
      esac
    done
    """
    monkeypatch.setenv("NCU", str(program(tmp_path / "ncu", script)))
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    launched = program(tmp_path / "program", f'test -d "${profiled.SOURCES}"')
    first, second = profile.of_command([str(launched)], tmp_path / "a.ncu-rep")
    assert (first.kernel, first.lines) == ("first", ())
    assert (second.kernel, second.lines) == ("second", source.parse(SOURCE))


NOTED = """
from pathlib import Path
import cupy
from custom_kernels.inspect import compilers
from custom_kernels.profile import profiled
CODE = '''extern "C" __global__ void scale(float* y) {
  __shared__ float tile[256];
  tile[threadIdx.x] = y[blockIdx.x * 256 + threadIdx.x];
  __syncthreads();
  y[blockIdx.x * 256 + threadIdx.x] = FACTOR * tile[255 - threadIdx.x];
}'''
plain = cupy.RawKernel(CODE, "scale", ("-DFACTOR=2",))
profiled.note_lines()
noted, other = (profiled._with_lines(plain) for _ in range(2))
cubins = [
    compilers._compiled_by_cupy(kernel, kernel.code, "kernel", "90")[0] for kernel in (plain, noted)
]
instructions = [compilers._disassembled(cubin) for cubin in cubins]
assert instructions[0] and instructions[0] == instructions[1], instructions
files = [Path(kernel.code.split('"')[1]) for kernel in (noted, other)]
assert files[0] != files[1]  # kernels of one name, each with its own source
for file in files:
    assert file.read_text() == CODE
assert b"scale.cu" not in cubins[0] and b"scale.cu" in cubins[1]
"""


def test_raw_kernels_are_profiled_with_line_information_and_the_same_instructions(
    tmp_path: Path,
) -> None:
    pytest.importorskip("cupy")
    done = subprocess.run(
        [sys.executable, "-c", NOTED],
        capture_output=True, text=True, check=False,
        env={**os.environ, profiled.SOURCES: str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


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
        ncu.find()
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
        ncu.find()
    except UsageError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-m", "custom_kernels.profile", "gemm", "--backend", "reference",
         "--model", "qwen2.5-0.5b", "--layer", "o", "--tokens", "256", "--output", str(tmp_path)],
        capture_output=True, text=True, check=False, env=dict(os.environ),
    )  # fmt: skip
    if "keeps the GPU's hardware counters" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert "profiling gemm.reference at qwen2.5-0.5b o M=256 N=896 K=896" in done.stdout
    assert "normal" not in done.stdout  # torch's kernel that fills with random numbers
    assert len(list(tmp_path.glob("*.ncu-rep"))) == 1
