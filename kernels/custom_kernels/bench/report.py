# SPDX-License-Identifier: Apache-2.0
"""A record of a kernel benchmark on the screen."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from custom_kernels.bench.intervals import coloured
from custom_kernels.bench.record import Captured, Failed, Record, Row, Timed, Weighted
from custom_kernels.command import console

if TYPE_CHECKING:
    from rich.table import Table


def show(record: Record, files: Sequence[Path]) -> None:
    """Print a record, and the files that were written of it."""
    screen = console(180)
    screen.print(headline(record), markup=False)
    for name, reason in record.skipped.items():
        screen.print(f"not timed: {name}: {reason}", markup=False)
    screen.print(table(record))
    for line in summary_lines(record):
        screen.print(line, markup=False)
    for warning in record.warnings:
        screen.print(f"warning: {warning}", style="yellow", markup=False)
    for failure in record.failures:
        print(f"failed: {failure}", file=sys.stderr)
    for path in files:
        screen.print(f"wrote {path}", markup=False, soft_wrap=True)
    screen.print(f"re-run: {record.provenance.command}", markup=False, soft_wrap=True)


def headline(record: Record) -> str:
    """What was measured, where, and what the device can do."""
    limits = record.ceilings
    peaks = [f"{rate / 1e12:.0f} TFLOP/s {name}" for name, rate in limits.flops_per_second.items()]
    products = f", multiplies {', '.join(peaks)}" if peaks else ""
    return (
        f"{record.operation} {record.dtype} on {record.provenance.device}, "
        f"baseline {record.baseline}: copies {limits.bytes_per_second / 1e12:.2f} TB/s"
        f"{products} (measured in this run)"
    )


def table(record: Record) -> "Table":
    """A line per case and contender; the case is named in its first line."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    names = list(dict.fromkeys(name for row in record.rows for name in row.labels))
    shown = Table(header_style="bold", pad_edge=False, box=SIMPLE_HEAD)
    for name in names:
        shown.add_column(name, justify="right" if len(name) == 1 else "left")
    if record.captured:
        shown.add_column("calls", justify="right", no_wrap=True)
    shown.add_column("contender")
    for name in ("µs", "p20-p80", "TFLOP/s", "GB/s", "% copy", "% matmul", "% roofline", "ratio"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("verdict")
    for row in record.rows:
        labels = [str(row.labels.get(name, "")) for name in names]
        labels += [f"{row.calls:,}"] if record.captured else []
        for name, measured in row.contenders.items():
            shown.add_row(*labels, name, *_cells(measured, name == record.baseline))
            labels = [""] * len(labels)
    return shown


def _cells(measured: Timed | Failed, is_baseline: bool) -> list[str]:
    if isinstance(measured, Failed):
        from rich.markup import escape

        return [*[""] * 8, f"[red]{escape(measured.failure)}[/]"]
    ratio, verdict = "1" if is_baseline else "", "baseline" if is_baseline else ""
    if measured.ratio is not None:
        ratio = f"{measured.ratio:.3f} ({measured.low:.3f}-{measured.high:.3f})"
    if measured.verdict is not None:
        verdict = coloured(measured.verdict)
    return [
        _short(measured.us),
        f"{_short(measured.p20)}-{_short(measured.p80)}",
        _short(measured.tflops),
        _short(measured.gbytes_per_second),
        _short(measured.percent_of_copy),
        _short(measured.percent_of_matmul),
        _short(measured.percent_of_roofline),
        ratio,
        verdict,
    ]


def _short(value: float | None) -> str:
    """Three figures or so: 0.82, 4.56, 45.6, 456, 4560."""
    if value is None:
        return ""
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def summary_lines(record: Record) -> list[str]:
    """A line per contender and model, and of a capture one per contender for all calls."""
    lines: list[str] = []
    if record.captured:
        lines += weighted_lines(record.captured, record.rows, record.weighted, record.baseline)
    return lines + [
        f"{name}, {group}: geometric mean {one.geometric_mean:.3f} x {record.baseline}, "
        f"{one.lowest:.3f} to {one.highest:.3f}, "
        + ", ".join(f"{count} {verdict}" for verdict, count in one.verdicts.items())
        for name, groups in record.summary.items()
        for group, one in groups.items()
    ]


def weighted_lines(
    of: Captured, rows: Sequence[Row], found: Mapping[str, Weighted], baseline: str
) -> Iterator[str]:
    """What part of a capture was measured, and a line per contender for all its calls."""
    yield (
        f"{of.file}: {len(rows)} of {of.shapes} shapes, about {of.share:.0%} of the cost of all "
        "calls"
    )
    for name, one in found.items():
        missing = f"; it has no time for {', '.join(one.missing)}" if one.missing else ""
        yield (
            f"{name}, all calls at {one.shapes} of them: {one.ratio:.3f} "
            f"[{one.low:.3f}, {one.high:.3f}] x {baseline}, times summed over calls{missing}"
        )
