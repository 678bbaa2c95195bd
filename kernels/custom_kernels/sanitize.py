# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.sanitize KERNEL…``: NVIDIA's Compute Sanitizer over the checks of
kernels, whatever they are written in.

Each of its tools watches a process of its own in which ``custom_kernels.check`` calls the kernel on
every case:

- memcheck finds accesses out of bounds or misaligned, in global, shared and local memory. Torch
  hands out parts of large allocations, in which an access beyond a tensor stays unseen: here each
  tensor is an allocation of its own, with a gap behind it.
- racecheck finds accesses of two threads of a block to the same shared memory with no barrier
  between them. It does not look at global memory.
- initcheck finds reads of global memory that nothing has written since it was allocated: an output
  or a temporary that is read too early, or that a kernel left out. Inputs are always written.
- synccheck finds barriers that not all threads of a block or warp reach, and wrong masks of them.

The check is a bare one (``--bare``): nothing is poisoned, nothing runs in a CUDA graph. Kernels run
some ten times slower, so figures of time mean nothing. All kernels of the process are watched, also
those that torch fills and compares tensors with; a finding names its kernel.

What each tool wrote goes to benchmarks/results. Exits with 1 if anything was found, if a result was
wrong, or if there is no GPU or no Compute Sanitizer.
"""

import argparse
import contextlib
import glob
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from custom_kernels import registry
from custom_kernels.bench.plan import known
from custom_kernels.bench.record import results_folder
from custom_kernels.command import UsageError, command, console, exit_with, find_program
from custom_kernels.operation import Backend

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SANITIZER = "COMPUTE_SANITIZER"
"""Environment variable that names the program."""
INSTALLED = tuple(
    f"{folder}/compute-sanitizer"
    for folder in (
        f"{glob.escape(sys.prefix)}/bin",  # conda's package
        f"{glob.escape(sysconfig.get_path('purelib'))}/nvidia/cu*/bin",  # pip's
        "/usr/local/cuda/bin",
        "/usr/local/cuda*/bin",
    )
)
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
GAP = 4096
"""Bytes behind each allocation that memcheck allows nobody to touch."""
PRINTED = 1000
"""Errors that a tool describes; it counts all of them."""
AT_ONCE = 4
"""Processes; they spend most of their time on the CPU."""
TIMEOUT = 600
SHOWN = 3
"""Findings per kernel and tool on the screen."""

_MARK = "========="
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: ([\d,]+) (?:errors?|hazards? displayed .*)$")
_NO_REMARK = re.compile(r"COMPUTE-SANITIZER$|.* SUMMARY: |Target application returned an error")
_RIGHT = re.compile(r": (\d+) of (\d+) cases right, ")


@dataclass(frozen=True)
class Finding:
    """One kind of error at one place of the code."""

    text: str
    """What, in which kernel and line, and for the first one by which thread and at which
    address."""
    count: int
    """How often it was described."""

    def __str__(self) -> str:
        return self.text + (f" ({self.count} times)" if self.count > 1 else "")


@dataclass(frozen=True)
class Report:
    """What a tool wrote."""

    errors: int | None
    """Errors or hazards in all, by its last line; None if it was ended before."""
    findings: tuple[Finding, ...] = ()
    remarks: tuple[str, ...] = ()
    """What it says of itself: that it could not watch something, for example."""


@dataclass(frozen=True)
class Job:
    """One tool over the check of one backend."""

    kernel: str
    tool: str


@dataclass(frozen=True)
class Run:
    """What became of a job."""

    job: Job
    report: Report
    right: bool
    """Whether the check found every result right."""
    output: str
    """Of the check."""
    seconds: float
    log: Path

    @property
    def verdict(self) -> str:
        """For a cell of the table."""
        errors = self.report.errors
        if errors is None and not self.report.findings:
            return "no result"
        errors = errors or sum(finding.count for finding in self.report.findings)
        if errors:
            noun = "hazard" if self.job.tool == "racecheck" else "error"
            return f"{errors:,} {noun}" + ("s" if errors > 1 else "")
        if self.report.remarks:
            return "incomplete"
        return "clean" if self.right else "wrong result"


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run, print. Returns the exit status."""
    options = _parser().parse_args(arguments)
    tools = known("tool", options.tool.replace(",", " ").split(), TOOLS)
    if not torch.cuda.is_available():
        raise UsageError(
            "Compute Sanitizer needs a GPU and torch sees none; without one, "
            f"`make test K={options.kernel[0]}` checks what runs on a CPU"
        )
    find_sanitizer()  # before anything is compiled
    backends = chosen(options.kernel, torch.device("cuda", torch.cuda.current_device()))
    check = [] if options.full else ["--quick"]
    if options.dtype:
        for operation in {backend.operation for backend in backends}:
            known("dtype", [options.dtype], operation.cases.DTYPES)
        check += ["--dtype", options.dtype]
    jobs = [Job(str(backend), tool) for backend in backends for tool in tools]
    screen = console(140)
    screen.print(f"each kernel once without a tool, then {len(jobs)} times under one")
    runs: list[Run] = []
    for run in run_all(jobs, check, options.output or results_folder(), options.timeout):
        screen.print(f"{run.job.kernel}, {run.job.tool}: {run.verdict}, {run.seconds:.0f} s")
        runs.append(run)
    runs.sort(key=lambda run: jobs.index(run.job))
    screen.print(table(runs))
    for run in runs:
        explain(run, screen)
    return 0 if all(run.verdict == "clean" for run in runs) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m custom_kernels.sanitize", description=__doc__)
    parser.add_argument("kernel", nargs="+", help="an operation, or operation.backend")
    parser.add_argument("--tool", default=",".join(TOOLS), help="with commas; default all four")
    parser.add_argument("--dtype", help="default: the first that the backend supports")
    parser.add_argument("--full", action="store_true", help="all dtypes, two sets of numbers")
    parser.add_argument(
        "--timeout", type=int, default=TIMEOUT, help=f"seconds per process; default {TIMEOUT}"
    )
    parser.add_argument("--output", type=Path, help="folder for the logs")
    return parser


def find_sanitizer() -> str:
    """The program: $COMPUTE_SANITIZER, from PATH, or where it is installed. Raises UsageError."""
    if found := find_program("compute-sanitizer", SANITIZER, INSTALLED):
        return found
    raise UsageError(
        "Compute Sanitizer (compute-sanitizer) was not found: it is in the CUDA toolkit and in "
        "NVIDIA's package nvidia-cuda-sanitizer-api; install one of them, or name the program "
        f"with {SANITIZER}="
    )


def chosen(words: Sequence[str], device: torch.device) -> list[Backend]:
    """The backends with kernels of their own or a library's that can run; others are printed.

    Raises:
        UsageError: there is none.
        BackendError: an operation or backend that does not exist.
    """
    found = []
    for backend in registry.select(words):
        if backend.kind == "torch":
            print(f"{backend}: left out, its kernels are torch's")
        elif reason := backend.unavailable_reason(device):
            print(f"{backend}: left out, {reason}")
        else:
            found.append(backend)
    if not found:
        raise UsageError(f"{', '.join(words)}: no kernel to watch on {device}")
    return found


# --- the processes --------------------------------------------------------------------------------


def run_all(
    jobs: Sequence[Job], check: Sequence[str], folder: Path, timeout: float = TIMEOUT
) -> Iterator[Run]:
    """Run the jobs, some at a time; each as it ends.

    Before, each kernel runs once without a tool: what a first call compiles, or times and keeps
    (the plans of ``gemm.cublaslt``), must not be done under one.

    Args:
        check: options of ``custom_kernels.check``.
        folder: where the logs go.

    Raises:
        UsageError: there is no Compute Sanitizer.
    """
    program = find_sanitizer()
    folder.mkdir(parents=True, exist_ok=True)
    processes = _Processes(timeout)
    processes.output([*_checking(*dict.fromkeys(job.kernel for job in jobs)), *check])

    def run(job: Job) -> Run:
        log = folder / f"sanitize-{job.kernel}-{job.tool}.log"
        log.unlink(missing_ok=True)
        started = time.perf_counter()
        output = processes.output(watched(program, job, log, check))
        seconds = time.perf_counter() - started
        report = parse(log.read_text(errors="replace") if log.is_file() else "")
        counts = _RIGHT.findall(output)
        right = any(counts) and all(right == cases != "0" for right, cases in counts)
        return Run(job, report, right, output, seconds, log)

    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        try:
            for future in as_completed([pool.submit(run, job) for job in jobs]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end()


def watched(program: str, job: Job, log: Path, check: Sequence[str]) -> list[str]:
    """The command line of a job."""
    options = {
        "tool": job.tool,
        "log-file": str(log).replace("%", "%%"),
        "target-processes": "application-only",  # not nvcc and ptxas
        "destroy-on-device-error": "kernel",  # the cases after it run as well
        "show-backtrace": "device",
        "print-limit": str(PRINTED),
        "check-exit-code": "no",
    }
    if job.tool == "memcheck":
        # Libraries try calls that may fail; what fails in earnest fails the check.
        options |= {"padding": str(GAP), "report-api-errors": "no"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [program, *words, *_checking(job.kernel), *check]


def _checking(*kernels: str) -> list[str]:
    return [sys.executable, "-m", "custom_kernels.check", *kernels, "--bare"]


@dataclass
class _Processes:
    """Processes of several threads, which can be ended together."""

    timeout: float
    _live: list[subprocess.Popen[str]] = field(default_factory=list)

    def output(self, words: Sequence[str]) -> str:
        """What a command wrote, stdout and stderr; it is killed after the timeout."""
        with tempfile.TemporaryFile("w+", errors="replace") as file:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                start_new_session=True,  # the program that is watched ends with it
                text=True,
            )
            self._live.append(process)
            try:
                process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                return f"it did not end within {self.timeout:g} s"
            finally:
                _kill(process)
                self._live.remove(process)
            file.seek(0)
            return file.read()

    def end(self) -> None:
        for process in list(self._live):
            _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """And all that it started, unless it has ended."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# --- what they wrote ------------------------------------------------------------------------------


def parse(log: str) -> Report:
    """A tool's log. An error is a line and then indented ones, which say where; errors of the same
    kind at the same place are one finding."""
    errors = None
    records: list[list[str]] = []
    for line in log.splitlines():
        text = line.removeprefix(_MARK)
        if text == line or not text.strip():
            continue
        if summary := _SUMMARY.match(text.strip()):
            errors = (errors or 0) + int(summary[1].replace(",", ""))
        elif text.startswith("  ") and records:
            records[-1].append(text.strip())
        else:
            records.append([text.strip()])
    described = [record for record in records if len(record) > 1]
    places = Counter(map(_place, described))
    first = {_place(record): record for record in reversed(described)}
    alone = (record[0] for record in records if len(record) == 1)
    return Report(
        errors,
        tuple(Finding(_sentence(first[place]), count) for place, count in places.items()),
        tuple(dict.fromkeys(text for text in alone if not _NO_REMARK.match(text))),
    )


def _place(record: Sequence[str]) -> tuple[str, ...]:
    """What and where in the code, without thread, address and number."""
    what = re.sub(r"0x[0-9a-f]+", "0x…", record[0])
    code = (line for line in record[1:] if re.match(r"at |and (Read|Write) |Device Frame", line))
    return (what, *(re.sub(r" \[[\d,]+ hazards?\]$", "", line) for line in code))


def _sentence(record: Sequence[str]) -> str:
    """Its lines as one: a line with a capital says what is wrong with the access."""
    text = record[0].rstrip(".")
    for line in record[1:]:
        line = line.rstrip(".")
        if frame := re.match(r"Device Frame: ?(.*)", line):
            text += f", called from {frame[1]}"
        else:
            text += (": " if line[:1].isupper() else " ") + line
    return text


def table(runs: Sequence[Run]) -> "Table":
    """A line per kernel, a column per tool."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    tools = list(dict.fromkeys(run.job.tool for run in runs))
    verdicts = {run.job: run.verdict for run in runs}
    shown = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("kernel", *tools):
        shown.add_column(name, no_wrap=True)
    for kernel in dict.fromkeys(run.job.kernel for run in runs):
        cells = [verdicts[Job(kernel, tool)] for tool in tools]
        styled = (Text(cell, style="" if cell == "clean" else "red") for cell in cells)
        shown.add_row(kernel, *styled)
    return shown


def explain(run: Run, screen: "Console") -> None:
    """Print what a tool found, in full; nothing where all is clean."""
    if run.verdict == "clean":
        return
    lines = [str(finding) for finding in run.report.findings[:SHOWN]]
    lines += run.report.remarks
    if not run.report.findings:
        lines += run.output.strip().splitlines()[-SHOWN:]
    if more := len(run.report.findings) - SHOWN:
        lines += [f"{more} more places"] if more > 0 else []
    lines += [f"all of it: {run.log}"] if run.log.is_file() else []
    screen.print(f"{run.job.kernel}, {run.job.tool}: {run.verdict}", markup=False)
    for line in lines:
        screen.print(f"  {line}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    exit_with(main)
