# SPDX-License-Identifier: Apache-2.0
"""Reports as a table."""

from collections.abc import Sequence
from typing import Any

from custom_kernels.inspect.report import Report


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
    for known in ("(anonymous namespace)::", "custom_kernels::", "cutlass::"):
        kernel = kernel.replace(known, "")
    kernel = kernel.removeprefix("void ")
    return kernel if len(kernel) <= width else f"{kernel[: width - 21]}…{kernel[-20:]}"
