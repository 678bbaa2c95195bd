# SPDX-License-Identifier: Apache-2.0
"""Show verdicts: on a terminal one screen that stays, with the last versions of every backend;
elsewhere each verdict as lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Self

from custom_kernels.inspect.report import Report
from custom_kernels.inspect.table import short
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from workspace.watch.messages import Timing
from workspace.watch.verdict import Verdict

HISTORY = 8
COLOURS = {"right": "green", "compiled": "green", "wrong": "red"}


def figures(verdict: Verdict, previous: Verdict | None) -> list[str]:
    """A line per kernel and per timed case, with the change since `previous`."""
    earlier = {report.kernel: report for report in previous.reports} if previous else {}
    lines = []
    for report in verdict.reports:
        old = earlier.get(report.kernel, report)
        parts = [
            f"registers {_changed(report.registers, old.registers)}",
            f"spills {_changed(report.spills, old.spills, ' B')}",
            f"shared {_changed(report.shared, old.shared, ' B')}",
            f"SASS {_changed(report.sass, old.sass, ' B')}",
            " ".join(f"{name} x{count}" for name, count in sorted(report.tensor.items())),
            f"load {report.load}" if report.load else "",
            f"store {report.store}" if report.store else "",
        ]
        name = f"{short(report.kernel)} [{report.architecture}]"
        lines.append(f"{name}: {', '.join(filter(None, parts))}")
    for case, timing in verdict.times.items():
        if timing.microseconds is None:
            lines.append(f"{case}: not timed: {timing.failure}")
            continue
        old_timing = previous.times.get(case) if previous else None
        old_time = old_timing.microseconds if old_timing else None
        versus = f" ({timing.microseconds / old_time - 1:+.1%})" if old_time else ""
        ratio = f", {timing.ratio:.2f} x {timing.baseline}" if timing.ratio else ""
        calls = f", {timing.calls:,} calls" if timing.calls else ""
        lines.append(f"{case}: {timing.microseconds:.2f} µs{versus}{ratio}{calls}")
    return lines


def _changed(value: int, old: int, unit: str = "") -> str:
    return f"{value}{unit}" + (f" ({value - old:+}{unit})" if value != old else "")


class Screen:
    """Shows verdicts and keeps each backend's versions."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.history: dict[str, list[Verdict]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def busy(self, backend: str) -> None:
        """A backend is being worked on."""

    def show(self, verdict: Verdict) -> None:
        self.history.setdefault(verdict.backend, []).append(verdict)

    def last_compiled(self, backend: str, versions: int | None = None) -> Verdict | None:
        """The last version that compiled, of all or of the first `versions`."""
        earlier = self.history.get(backend, [])[:versions]
        return next((one for one in reversed(earlier) if one.reports), None)


class Lines(Screen):
    """Each verdict as lines, for a log."""

    def __init__(self, title: str) -> None:
        super().__init__(title)
        print(title, flush=True)

    def show(self, verdict: Verdict) -> None:
        lines = figures(verdict, self.last_compiled(verdict.backend))
        super().show(verdict)
        remarks = f" ({'; '.join(verdict.remarks)})" if verdict.remarks else ""
        state = f"{verdict.backend}: {verdict.state}{remarks}, {verdict.seconds:.2f} s"
        below = [line.replace("\n", "\n    ") for line in [*verdict.details, *lines]]
        # In one write: a reader gets whole verdicts.
        print("\n    ".join([f"[{verdict.number}] {state}", *below]), flush=True)


class LiveScreen(Screen):
    """One screen that stays: per backend the last version in full, earlier ones as a row each."""

    def __init__(self, title: str, console: Console) -> None:
        super().__init__(title)
        self.console = console
        self.working = ""
        self.live = Live(console=console, auto_refresh=False, screen=False)

    def __enter__(self) -> Self:
        self.console.clear()
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def busy(self, backend: str) -> None:
        self.working = backend
        self.live.update(self._draw(), refresh=True)

    def show(self, verdict: Verdict) -> None:
        super().show(verdict)
        self.working = ""
        self.live.update(self._draw(), refresh=True)

    def _draw(self) -> RenderableType:
        parts: list[RenderableType] = [Text(f"{self.title}    Ctrl-C ends", style="dim")]
        for backend, versions in self.history.items():
            parts.append(self._versions(backend, versions))
            last = versions[-1]
            parts += [Text(f"  {line}", style="red") for line in last.details]
            parts += [
                Text.from_markup("  " + _marked(line))
                for line in figures(last, self.last_compiled(backend, -1))
            ]
            parts += [Text(f"  {line}", style="yellow") for line in last.remarks]
        if self.working:
            parts.append(Text(f"working on {self.working} …", style="cyan"))
        return Group(*parts)

    def _versions(self, backend: str, versions: Sequence[Verdict]) -> Table:
        table = Table(title=backend, title_justify="left", title_style="bold", header_style="bold")
        table.add_column("", justify="right")
        table.add_column("verdict", no_wrap=True)
        for name in ("registers", "spills", "shared", "SASS", "time", "from save"):
            table.add_column(name, justify="right", no_wrap=True)
        for one in versions[-HISTORY:]:
            style = COLOURS.get(one.state, "red")
            table.add_row(
                str(one.number),
                f"[{style}]{one.state}[/]",
                *(_most(one.reports, name) for name in ("registers", "spills", "shared", "sass")),
                _time(list(one.times.values())),
                f"{one.seconds:.2f} s",
            )
        return table


def _most(reports: Sequence[Report], name: str) -> str:
    return str(max(getattr(report, name) for report in reports)) if reports else "-"


def _time(timings: Sequence[Timing]) -> str:
    """Of each case; of captured shapes that of all calls."""
    timed = [(one.microseconds, one.calls or 0) for one in timings if one.microseconds is not None]
    if not timed:
        return "-"
    if calls := sum(us * count for us, count in timed):
        return f"{calls / 1000:.3g} ms" + (" in part" if len(timed) < len(timings) else "")
    return ", ".join(f"{us:.1f} µs" for us, _ in timed)


def _marked(line: str) -> str:
    """Changes in colour: more is red, less is green."""
    line = escape(line)
    line = re.sub(r"(\(\+[^)]*\))", r"[red]\1[/]", line)
    return re.sub(r"(\(-[^)]*\))", r"[green]\1[/]", line)
