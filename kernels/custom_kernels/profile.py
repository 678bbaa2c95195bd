# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.profile OPERATION --backend NAME``: Nsight Compute on one call of
one backend; ``of_launches`` does the same for kernels of a notebook.

A child process sets up the case and warms up the backend; only the one call after that is
profiled, with flushed caches and with the clocks as they are. The report, for ``ncu-ui``, goes to
benchmarks/results; its key figures are printed. Exits with 1 if there is no GPU, no ``ncu``, or
nothing to profile.
"""

import argparse
import csv
import datetime
import io
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict

from custom_kernels import registry
from custom_kernels.bench.plan import backend_names, choose, known
from custom_kernels.bench.provenance import machine
from custom_kernels.bench.record import Provenance, label_text, results_folder
from custom_kernels.check.case import Case, contender_of
from custom_kernels.command import (
    UsageError,
    command,
    console,
    exit_with,
    find_program,
    write_whole,
)
from custom_kernels.compile.toolchain import BuildError

if TYPE_CHECKING:
    from rich.table import Table

NCU = "NCU"
"""Environment variable that names the program."""
INSTALLED = (
    "/usr/local/cuda/bin/ncu",
    "/opt/nvidia/nsight-compute/*/ncu",
    "/usr/local/cuda*/bin/ncu",
)
CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")
"""Files that Docker and podman put into every container."""
TOP_STALLS = 3

_STALL = re.compile(r"^smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio$")
_SECTORS = "l1tex__t_sectors_pipe_lsu_mem_global_op_{}.sum"
_REQUESTS = "l1tex__t_requests_pipe_lsu_mem_global_op_{}.sum"
_SHARED_PASSES = "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum"
_SHARED_LOADS = "smsp__sass_inst_executed_op_shared_ld.sum"
_TENSOR = re.compile(r"pipe_tensor\w*\.avg\.pct_of_peak_sustained_(?:active|elapsed)$")


@dataclass(frozen=True)
class Profile:
    """The key figures of one kernel launch; None for what this ncu or GPU does not count."""

    kernel: str
    microseconds: float | None
    dram_percent: float | None
    """Of the peak bandwidth that ncu knows, not of a measured copy."""
    sm_percent: float | None
    tensor_percent: float | None
    """Of the busiest tensor pipe, while the SMs were active."""
    l1_percent: float | None
    """Of what L1 and shared memory can move, while the SMs were active."""
    l2_percent: float | None
    dram_bytes: float | None
    """Read plus written."""
    load_sectors: float | None
    """Sectors of 32 bytes per request of a warp that loads from global memory."""
    store_sectors: float | None
    shared_load_passes: float | None
    """Passes through shared memory per load of a warp, bank conflicts included."""
    occupancy: float | None
    """Achieved, percent of the warps an SM can hold."""
    occupancy_limit: float | None
    registers: float | None
    shared_bytes: float | None
    stalls: tuple[tuple[str, float], ...]
    """The reasons for which warps waited, the longest first, and their share of the time between
    two instructions of a warp, percent."""


@dataclass(frozen=True)
class Launch:
    """One launch of a CuPy kernel, to be profiled in another process."""

    kernel: Any
    """A ``cupy.RawKernel``."""
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: tuple[Any, ...]
    """Numbers as the kernel takes them, and tensors. Of a tensor only shape and dtype are used, so
    its device may be ``meta``: random numbers are in it when the kernel runs."""
    shared: int = 0
    """Bytes of dynamic shared memory per block."""


class Recorded(BaseModel):
    """Profiles in a file, each under a name, and where they come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provenance: Provenance
    profiles: dict[str, Profile]


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Profile, or be the process that is profiled. Returns the exit status."""
    options = _parser().parse_args(arguments)
    (_call if options.child else _profile)(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m custom_kernels.profile", description=__doc__)
    parser.add_argument("operation", help=f"one of {', '.join(map(str, registry.operations()))}")
    parser.add_argument("--backend", help="default: the best for this device")
    parser.add_argument("--model", help="default: the last of those measured by default")
    parser.add_argument("--layer", help="default: the first of the model")
    parser.add_argument("--tokens", type=int, default=4096, help="M")
    parser.add_argument("--pattern", help="sparsity pattern; default: the first")
    parser.add_argument("--dtype", help="default: the operation's first")
    parser.add_argument("--output", type=Path, help="folder for the report")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


# --- the process that is profiled -----------------------------------------------------------------


def case_of(options: argparse.Namespace, definition: ModuleType) -> Case:
    """The one case of these options.

    Raises:
        UsageError: there is none; names the values that exist.
    """
    models = known("model", [options.model or definition.DEFAULT_MODELS[-1]], definition.MODELS)
    (dtype,) = known("dtype", [options.dtype or definition.DTYPES[0]], definition.DTYPES)
    cases = definition.cases(models, [options.tokens], dtype)
    for label in ("layer", "pattern"):
        cases = choose(cases, label, filter(None, [getattr(options, label)]))
    return cases[0]


def _call(options: argparse.Namespace) -> None:
    """Warm up, then one call between cudaProfilerStart and cudaProfilerStop."""
    operation = registry.operation(options.operation)
    device = torch.device("cuda", torch.cuda.current_device())
    case = case_of(options, operation.cases)
    dtype = options.dtype or operation.cases.DTYPES[0]
    try:
        contender = contender_of(operation.backend(options.backend), device, dtype)
    except BuildError as error:
        raise UsageError(str(error)) from error
    inputs = case.empty_inputs(device)
    case.fill(inputs)
    arguments = contender.prepare(inputs)
    _profile_call(lambda: contender.run(*arguments), device)


def _profile_call(call: Callable[[], object], device: torch.device) -> None:
    for _ in range(3):  # compiles, searches, loads modules
        call()
    torch.cuda.synchronize(device)
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize(device)
    torch.cuda.profiler.stop()


def run_launches(file: str) -> None:
    """Run the launches that ``of_launches`` wrote, in their order."""
    import cupy

    device = torch.device("cuda", torch.cuda.current_device())
    launches: list[Launch] = pickle.loads(Path(file).read_bytes())
    arguments = [
        [
            torch.randn(one.shape, device=device).to(one.dtype)
            if isinstance(one, torch.Tensor)
            else one
            for one in launch.arguments
        ]
        for launch in launches
    ]

    def call() -> None:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream):
            for launch, own in zip(launches, arguments, strict=True):
                if launch.shared:
                    launch.kernel.max_dynamic_shared_size_bytes = launch.shared
                values = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in own]
                launch.kernel(launch.grid, launch.block, (*values,), shared_mem=launch.shared)

    _profile_call(call, device)


# --- the process that profiles --------------------------------------------------------------------


def of_launches(launches: Sequence[Launch], report: Path) -> list[Profile]:
    """Profile launches of CuPy kernels in a process of their own.

    Args:
        report: where ncu's report goes, for ``ncu-ui``; its folder exists.

    Returns:
        A profile for each.

    Raises:
        UsageError: there is no ``ncu``, or it failed; its reason.
    """
    code = "import sys; from custom_kernels import profile; profile.run_launches(sys.argv[1])"
    sent = [
        replace(
            launch,
            arguments=tuple(
                one.to("meta") if isinstance(one, torch.Tensor) else one for one in launch.arguments
            ),
        )
        for launch in launches
    ]
    with tempfile.NamedTemporaryFile() as file:
        file.write(pickle.dumps(sent))
        file.flush()
        return of_command([sys.executable, "-P", "-c", code, file.name], report)


def of_command(command: Sequence[str], report: Path) -> list[Profile]:
    """Profile what a program launches between ``torch.cuda.profiler.start()`` and ``stop()``."""
    ncu = find_ncu()
    run_ncu(ncu, report, command)
    return parse(_raw(ncu, report))


def write(path: Path, profiles: Mapping[str, Profile], command: str) -> None:
    """Write profiles that were made on this machine's GPU.

    Args:
        command: what repeats them.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    recorded = Recorded(provenance=machine(device, command), profiles=dict(profiles))
    text = recorded.model_dump_json(indent=1) + "\n"
    write_whole(path, lambda partial: partial.write_text(text))


def read(path: Path) -> Recorded:
    """Read what ``write`` wrote."""
    return Recorded.model_validate_json(path.read_text())


def _profile(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise UsageError(
            "profiling needs a GPU and torch sees none; without one, "
            f"`make inspect K={options.operation}` shows registers, occupancy and instructions"
        )
    find_ncu()  # before anything is compiled
    operation = registry.operation(options.operation)
    case = case_of(options, operation.cases)
    device = torch.device("cuda", torch.cuda.current_device())
    if options.backend is None:
        first = next(iter(case.empty_inputs(torch.device("meta"))))
        options.backend = operation.best(device, first.dtype).name
    known("backend", [options.backend], backend_names(options.operation))
    name, labels = f"{operation}-{options.backend}", label_text(case.labels)
    print(f"profiling {operation}.{options.backend} at {labels}")
    folder = options.output or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H%M%SZ")
    slug = re.sub(r"[^\w.-]+", "-", labels)
    report = folder / f"profile-{name}-{slug}-{stamp}.ncu-rep"
    child = [sys.executable, "-m", "custom_kernels.profile", *_child(options)]
    profiles = of_command(child, report)
    if not profiles:
        raise UsageError(f"no kernel ran in the profiled call; ncu's report is {report}")
    screen = console(140)
    screen.print(table(profiles))
    screen.print(f"wrote {report}; open it with ncu-ui", soft_wrap=True, markup=False)


def _child(options: argparse.Namespace) -> list[str]:
    words = [options.operation, "--child"]
    for name in ("backend", "model", "layer", "tokens", "pattern", "dtype"):
        value = getattr(options, name)
        words += [f"--{name}", str(value)] if value else []
    return words


def find_ncu() -> str:
    """The program: $NCU, from PATH, or where CUDA's installer puts it. Raises UsageError."""
    if found := find_program("ncu", NCU, INSTALLED):
        return found
    raise UsageError(
        "Nsight Compute (ncu) is not on PATH: install NVIDIA's package nsight-compute, or name "
        f"the program with {NCU}="
    )


def run_ncu(ncu: str, report: Path, command: Sequence[str]) -> None:
    """Profile ``command`` into ``report``. Raises UsageError with ncu's reason if that fails."""
    done = subprocess.run(
        [
            ncu,
            "--set=full",
            "--profile-from-start=off",  # the call begins it, so torch's fills are left out
            "--clock-control=none",  # the machine's clocks are not ours to set
            "--cache-control=all",  # cold, as in the bench
            "--target-processes=application-only",
            "--import-source=yes",
            "--force-overwrite",
            f"--export={report.with_suffix('')}",
            *command,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    if "ERR_NVGPUCTRPERM" in output:
        raise UsageError(_no_counters(in_container(), os.geteuid() == 0))
    if done.returncode != 0 or not report.is_file():
        raise UsageError(f"ncu failed: {_reason(output)}")


def in_container() -> bool:
    """Whether this runs in a container of Docker or podman."""
    return any(Path(mark).exists() for mark in CONTAINER_MARKS)


def _no_counters(container: bool, root: bool) -> str:
    """What lets ncu read the hardware counters, by user and host.

    The driver gives them to processes with CAP_SYS_ADMIN only, unless its option says otherwise.
    root on the host has the capability, root in a container has it where the container was given
    it, other users have it nowhere.
    """
    option = "the driver option NVreg_RestrictProfilingToAdminUsers=0"
    if container:
        capability = "give the container the capability (docker's --cap-add=SYS_ADMIN)"
        capability += "" if root else " and profile as root in it"
        remedy = f"set {option} on the host, or {capability}; see .devcontainer/README.md"
    else:
        remedy = f"set {option}" + ("" if root else ", or profile with sudo")
        remedy += "; see https://developer.nvidia.com/ERR_NVGPUCTRPERM"
    return f"the driver keeps the GPU's hardware counters from this process: {remedy}"


def _reason(output: str) -> str:
    """The most informative line of ncu's output: the child's error, ncu's own, or the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for mark in ("error: ", "==ERROR=="):
        for line in lines:
            if mark in line:
                return line.removeprefix("error: ")
    return lines[-1] if lines else "no output"


def _raw(ncu: str, report: Path) -> str:
    words = [ncu, "--import", str(report), "--page=raw", "--csv", "--print-units=base"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UsageError(f"ncu cannot read its own report: {_reason(done.stdout + done.stderr)}")
    return done.stdout


def parse(raw: str) -> list[Profile]:
    """The key figures from ``ncu --page raw --csv --print-units base``: a header, a line of units,
    then a line per kernel."""
    lines = raw.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))
    return [_figures(row) for row in rows if row["ID"]]


def _figures(row: dict[str, str]) -> Profile:
    figures = {name: value for name, text in row.items() if (value := _number(text)) is not None}
    nanoseconds = figures.get("gpu__time_duration.sum")
    of_peak = "avg.pct_of_peak_sustained_elapsed"
    tensor = [value for name, value in figures.items() if _TENSOR.search(name)]
    return Profile(
        kernel=row["Kernel Name"],
        microseconds=None if nanoseconds is None else nanoseconds / 1e3,
        dram_percent=figures.get(
            f"gpu__dram_throughput.{of_peak}", figures.get(f"dram__throughput.{of_peak}")
        ),
        sm_percent=figures.get(f"sm__throughput.{of_peak}"),
        tensor_percent=max(tensor, default=None),
        l1_percent=figures.get("l1tex__throughput.avg.pct_of_peak_sustained_active"),
        l2_percent=figures.get(f"lts__throughput.{of_peak}"),
        dram_bytes=_sum(figures, "dram__bytes_read.sum", "dram__bytes_write.sum"),
        load_sectors=_ratio(figures, _SECTORS.format("ld"), _REQUESTS.format("ld")),
        store_sectors=_ratio(figures, _SECTORS.format("st"), _REQUESTS.format("st")),
        shared_load_passes=_ratio(figures, _SHARED_PASSES, _SHARED_LOADS),
        occupancy=figures.get("sm__warps_active.avg.pct_of_peak_sustained_active"),
        occupancy_limit=figures.get("sm__maximum_warps_per_active_cycle_pct"),
        registers=figures.get("launch__registers_per_thread"),
        shared_bytes=figures.get("launch__shared_mem_per_block"),
        stalls=_stalls(figures),
    )


def _sum(figures: Mapping[str, float], *names: str) -> float | None:
    values = [figures[name] for name in names if name in figures]
    return sum(values) if len(values) == len(names) else None


def _ratio(figures: Mapping[str, float], above: str, below: str) -> float | None:
    if above not in figures or not figures.get(below):
        return None
    return figures[above] / figures[below]


def _stalls(figures: dict[str, float]) -> tuple[tuple[str, float], ...]:
    cycles = {match[1]: value for name, value in figures.items() if (match := _STALL.match(name))}
    total = sum(cycles.values())
    cycles.pop("selected", None)  # the warp that issues does not wait
    worst = sorted(cycles.items(), key=lambda item: -item[1])
    return tuple((name.replace("_", " "), 100 * value / total) for name, value in worst if value)


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def table(profiles: Sequence[Profile]) -> "Table":
    """A line per kernel that the call launched."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("kernel", overflow="ellipsis", no_wrap=True, max_width=44)
    for name in ("µs", "DRAM %", "SM %", "tensor %", "occupancy %", "regs", "shared"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("warps wait for")
    for one in profiles:
        limit = "" if one.occupancy_limit is None else f" of {one.occupancy_limit:.0f}"
        shown.add_row(
            one.kernel,
            _text(one.microseconds, 2),
            _text(one.dram_percent),
            _text(one.sm_percent),
            _text(one.tensor_percent),
            _text(one.occupancy) + limit,
            _text(one.registers, 0),
            _text(one.shared_bytes, 0),
            ", ".join(f"{name} {share:.0f} %" for name, share in one.stalls[:TOP_STALLS]),
        )
    return shown


def _text(value: float | None, places: int = 1) -> str:
    return "n/a" if value is None else f"{value:.{places}f}"


if __name__ == "__main__":
    exit_with(main)
