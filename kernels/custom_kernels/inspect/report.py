# SPDX-License-Identifier: Apache-2.0
"""One kernel on one architecture: what its compiler and its machine code say, and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from custom_kernels.inspect import assembly


@dataclass(frozen=True)
class Report:
    """One kernel on one architecture. Sizes are in bytes; registers, stack and spills per thread,
    shared memory per block."""

    operation: str
    backend: str
    kernel: str
    architecture: str
    registers: int
    stack: int
    spills: int
    local: int
    """What its instructions move to and from local memory, spills included, each counted once."""
    shared: int
    dynamic: bool
    """Whether the launch adds shared memory, so that ``shared`` is not all of it."""
    threads: int | None
    """Per block, where the compiler knows."""
    ptx: int | None
    """Instructions of its PTX."""
    sass: int
    """Size of its machine code."""
    tensor: dict[str, int]
    """How often each tensor-core instruction stands in it; sparse forms end in ``.SP``."""
    load: str
    """The widest load from global memory."""
    store: str

    @property
    def occupancy(self) -> assembly.Occupancy | None:
        """None where the threads per block are not known, or the architecture is not."""
        if self.threads is None:
            return None
        return assembly.occupancy(self.architecture, self.threads, self.registers, self.shared)


class InspectionError(RuntimeError):
    """A kernel cannot be compiled. The message holds the compiler's own words, with file and
    line."""


def table(reports: Sequence[Report]) -> Any:
    """All reports as a Rich table."""
    from rich.markup import escape
    from rich.table import Table

    found = Table(header_style="bold")
    found.add_column("kernel", overflow="fold", min_width=20)
    for name in (
        "arch",
        "regs",
        "spills",
        "stack",
        "shared",
        "threads",
        "occupancy",
        "PTX",
        "SASS",
    ):
        found.add_column(name, justify="right", no_wrap=True)
    for name in ("tensor cores", "load", "store"):
        found.add_column(name, overflow="fold")
    before = None
    for report in sorted(reports, key=lambda one: (one.operation, one.backend, one.kernel)):
        backend = f"{report.operation}.{report.backend}: " if report.operation else ""
        name = f"{backend}{short(report.kernel)}"
        found.add_row("" if name == before else escape(name), *cells(report))
        before = name
    return found


def cells(report: Report) -> list[str]:
    """One report as the table shows it."""
    occupancy = report.occupancy
    tensor = " ".join(f"{name} x{count}" for name, count in sorted(report.tensor.items()))
    return [
        report.architecture,
        str(report.registers),
        f"[red]{report.spills}[/]" if report.spills else "0",
        str(report.stack),
        f"{report.shared}{' + dynamic' if report.dynamic else ''}",
        "?" if report.threads is None else str(report.threads),
        "?" if occupancy is None else f"{'≤ ' if report.dynamic else ''}{occupancy.share:.0%}",
        "?" if report.ptx is None else str(report.ptx),
        f"{report.sass / 1024:.1f} K",
        tensor or "-",
        report.load or "-",
        report.store or "-",
    ]


def short(kernel: str, width: int = 60) -> str:
    """A C++ name without namespaces that everybody knows, cut in its middle."""
    kernel = (
        kernel.replace("(anonymous namespace)::", "").replace("cutlass::", "").removeprefix("void ")
    )
    return kernel if len(kernel) <= width else f"{kernel[: width - 21]}…{kernel[-20:]}"
