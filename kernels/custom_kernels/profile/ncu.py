# SPDX-License-Identifier: Apache-2.0
"""Nsight Compute's program: find it, run it, and have it print a report.

Reports are read through the program that wrote them, as CSV, and not by NVIDIA's Python module
``ncu_report``: distributions put the module in other places, and it loads a library into this
process, while the program is always there.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from custom_kernels.command import UsageError, find_program

NCU = "NCU"
"""Environment variable that names the program."""
INSTALLED = (
    "/usr/local/cuda/bin/ncu",
    "/opt/nvidia/nsight-compute/*/ncu",
    "/usr/local/cuda*/bin/ncu",
)
CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")
"""Files that Docker and podman put into every container."""


def find() -> str:
    """The program: $NCU, from PATH, or where CUDA's installer puts it. Raises UsageError."""
    if found := find_program("ncu", NCU, INSTALLED):
        return found
    raise UsageError(
        "Nsight Compute (ncu) is not on PATH: install NVIDIA's package nsight-compute, or name "
        f"the program with {NCU}="
    )


def run(
    ncu: str, report: Path, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> None:
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
            f"--export={report}",  # with its suffix, of which ncu has several
            *command,
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    if "ERR_NVGPUCTRPERM" in output:
        raise UsageError(_no_counters(in_container(), os.geteuid() == 0))
    if done.returncode != 0 or not report.is_file():
        raise UsageError(f"ncu failed: {_reason(output)}")


def raw_page(ncu: str, report: Path) -> str:
    """All figures of all launches, as CSV. Raises UsageError if ncu cannot read the report."""
    status, page = _page(ncu, report, "--page=raw", "--print-units=base")
    if status != 0:
        raise UsageError(f"ncu cannot read its own report: {_reason(page)}")
    return page


def source_page(ncu: str, report: Path, launch: int) -> str:
    """The source lines of one launch, counted from 0, as CSV, see ``source.parse``; a warning if it
    has none."""
    _, page = _page(
        ncu, report, "--page=source", "--print-source=cuda,sass",
        f"--launch-skip={launch}", "--launch-count=1",
    )  # fmt: skip
    return page


def _page(ncu: str, report: Path, *options: str) -> tuple[int, str]:
    """Exit status and output."""
    done = subprocess.run(
        [ncu, "--import", str(report), "--csv", *options],
        # Where the locale has other separators of thousands, ncu writes them.
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    # Not as text: a row has the carriage return of its line of source.
    return done.returncode, done.stdout.decode(errors="replace")


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
