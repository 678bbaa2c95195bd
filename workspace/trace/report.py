# SPDX-License-Identifier: Apache-2.0
"""What the user sees of `make trace`: a table for each phase, and variants side by side."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from custom_kernels.command import console
from rich import box
from rich.markup import escape
from rich.table import Table

from workspace.bench import report
from workspace.bench.plan import Plan
from workspace.bench.variants import Variant
from workspace.fork.tree_state import shown
from workspace.host.text import plural
from workspace.trace.record import PhaseRecord, Record, Row, SideRecord

ROWS = 20
"""Of a table; the others are one row."""
WIDTH = 160
"""Columns of a table in a file or a pipe: names of kernels are long, and are cut, not wrapped."""
SMALLEST = 0.003
"""Share of a step that is worth a row."""


def announce(plan: Plan, variants: Sequence[Variant]) -> None:
    """Print what is traced."""
    names = " and ".join(variant.name for variant in variants)
    report.line(
        f"tracing {names}: {plural(plan.num_prompts, 'request')} of {plan.input_len} tokens in, "
        f"{plan.output_len} out (NUM_PROMPTS, INPUT_LEN and OUTPUT_LEN change it)"
    )


def show(record: Record, path: Path, plot: Path) -> None:
    """Print the tables and the paths."""
    screen = console(WIDTH)
    for side in record.sides:
        for phase in side.phases:
            screen.print(table(record, side, phase))
    if len(record.sides) > 1:
        for phase in record.sides[0].phases:
            if (both := side_by_side(record, phase.phase)) is not None:
                screen.print(both)
    if record.bytes_per_second:
        rates = [
            f"{rate / 1e12:,.0f} TFLOP/s in {name}"
            for name, rate in record.flops_per_second.items()
        ]
        reached = ", ".join([f"{record.bytes_per_second / 1e12:.2f} TB/s", *rates])
        report.console.print(f"roofline of linear layers, measured in this run: {reached}")
    slower = ", ".join(
        f"{side.name} {side.traced_s / side.untraced_s:.2f}" for side in record.sides
    )
    report.console.print(f"time under the profiler, of that without: {slower}")
    for failure in record.failures:
        report.console.print(f"[bold red]INVALID[/bold red] {escape(failure)}")
    for side in record.sides:
        for trace in side.traces:
            report.console.print(f"trace:   {escape(trace)} (open it in ui.perfetto.dev)")
    report.console.print(f"picture: {escape(shown(plot))}")
    report.console.print(f"record:  {escape(shown(path))}")
    report.console.print(f"re-run:  {escape(record.command)}")


def table(record: Record, side: SideRecord, phase: PhaseRecord) -> Table:
    """The kernels of a phase, the longest first, and what a step would take without each."""
    rooflines = any(row.roofline_us is not None for row in phase.rows)
    result = Table(title=headline(record, side, phase), title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("part", "kernel" if record.device_kind == "cuda" else "op"):
        result.add_column(name, overflow="ellipsis")
    numbers = ["calls", "mean, µs", "share", "without, ms"]
    for name in [*numbers, *(["roofline, ms"] if rooflines else [])]:
        result.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    rows = [row for row in phase.rows[:ROWS] if row.us >= SMALLEST * phase.us]
    others = phase.rows[len(rows) :]
    if others:
        calls, us = sum(row.calls for row in others), sum(row.us for row in others)
        rows.append(Row(part="…", kernel=plural(len(others), "other"), calls=calls, us=us))
    for row in rows:
        result.add_row(*cells(row, phase, rooflines=rooflines))
    result.add_section()
    waits = "the device waits" if record.device_kind == "cuda" else "Python, between ops"
    gaps = Row(part="gaps", kernel=waits, calls=0, us=phase.gaps_us)
    result.add_row(*cells(gaps, phase, rooflines=rooflines))
    return result


def headline(record: Record, side: SideRecord, phase: PhaseRecord) -> str:
    """What was traced, and how long a step takes."""
    busy = phase.busy_us / phase.us if phase.us else 0
    return (
        f"{side.name}, {phase.phase}: {plural(phase.steps, 'step')} of {phase.tokens:,.0f} tokens "
        f"of {phase.requests:,.0f} requests, {escape(record.model.name)}, {escape(record.device)}, "
        f"{'eager' if record.eager else 'compiled'}\n"
        f"a step takes {phase.us / 1e3:.3f} ms ({phase.fastest_us / 1e3:.3f} to "
        f"{phase.slowest_us / 1e3:.3f}), the device is busy for {busy:.1%} of it, of which "
        f"{phase.attributed:.1%} is attributed"
    )


def cells(row: Row, phase: PhaseRecord, *, rooflines: bool) -> list[str]:
    """The row of a table; without the row's kernels, or with them at their roofline, a step takes
    what Amdahl's law says."""
    rest = phase.us - row.us
    result = [
        escape(row.part),
        escape(row.kernel),
        f"{row.calls:,.4g}" if row.calls else "",
        f"{row.us / row.calls:,.1f}" if row.calls else "",
        f"{row.us / phase.us:.1%}" if phase.us else "",
        f"{rest / 1e3:.3f}",
    ]
    if rooflines:
        least = row.roofline_us
        result.append("" if least is None else f"{(rest + min(least, row.us)) / 1e3:.3f}")
    return result


def side_by_side(record: Record, phase: str) -> Table | None:
    """µs of each part in a step of both variants; None if one has no such steps."""
    found = [one for side in record.sides for one in side.phases if one.phase == phase]
    if len(found) < len(record.sides):
        return None
    result = Table(title=f"{phase}: µs a step", title_justify="left")
    result.add_column("part")
    for name in (*(side.name for side in record.sides), "difference", "of a step"):
        result.add_column(name, justify="right")
    for name, values in compared(found):
        difference = values[1] - values[0]
        colour = "green" if difference < 0 else "red"
        share = difference / found[0].us if found[0].us else 0
        notable = abs(share) >= SMALLEST
        text = f"{difference:+,.0f}"
        result.add_row(
            escape(name),
            *(f"{value:,.0f}" for value in values),
            f"[{colour}]{text}[/{colour}]" if notable else text,
            f"{share:+.1%}",
        )
    return result


def compared(phases: Sequence[PhaseRecord]) -> Iterator[tuple[str, list[float]]]:
    """µs of each part in each variant, the longest first; then gaps, and the whole step."""
    parts = [phase.parts() for phase in phases]
    names = sorted(
        {name for one in parts for name in one},
        key=lambda name: -max(one.get(name, 0.0) for one in parts),
    )
    for name in names:
        yield name, [one.get(name, 0.0) for one in parts]
    yield "gaps", [phase.gaps_us for phase in phases]
    yield "step", [phase.us for phase in phases]
