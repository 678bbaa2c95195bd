# SPDX-License-Identifier: Apache-2.0
"""What came of an upgrade: a table on the terminal, and a page with every detail."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workspace.host.files import write_file
from workspace.host.text import duration
from workspace.upgrade.steps import FOLDER, Steps

MARKS = {"ok": "✓", "failed": "✗", "skipped": "•"}
COLOURS = {"ok": "green", "failed": "red", "skipped": "yellow"}


def verdict(steps: Steps) -> str:
    """Whether the release can become the default one, and what to do."""
    target = steps.target
    failed, skipped = (
        [step.name for step in steps.done if step.status == status]
        for status in ("failed", "skipped")
    )
    if failed == ["patches"]:
        return (
            f"vLLM {target} has conflicts; resolve them in vllm-fork/src, git add the files, then: "
            "make upgrade (or to undo it: make fork-rebase ABORT=1)"
        )
    if failed:
        return f"vLLM {target} cannot become the default release: {', '.join(failed)} failed"
    if skipped:
        return (
            f"vLLM {target} cannot become the default release: {', '.join(skipped)} could not be "
            "done here"
        )
    return (
        f"vLLM {target} can become the default release: make upgrade VERSION={target} DEFAULT=1; "
        f"to work on it: make dev VLLM_VERSION={target}"
    )


def show(origin: str, steps: Steps, path: Path) -> None:
    table = Table("", "step", "what came of it", "time", title=f"vLLM {origin} → {steps.target}")
    for step in steps.done:
        mark = f"[{COLOURS[step.status]}]{MARKS[step.status]}[/]"
        seconds = duration(step.seconds) if step.seconds >= 1 else ""
        table.add_row(mark, step.name, escape(step.detail), seconds)
    console = Console(highlight=False, soft_wrap=not Console().is_terminal)
    console.print(table)
    console.print(verdict(steps), markup=False)
    console.print(f"report:  {path}", markup=False)


def write(origin: str, steps: Steps) -> Path:
    """Write the page; returns its path."""
    lines = [f"# vLLM {origin} → {steps.target}", "", verdict(steps), ""]
    lines += ["| | step | what came of it | time |", "|---|---|---|---|"]
    for step in steps.done:
        detail = step.detail.replace("|", "\\|")
        cells = (MARKS[step.status], step.name, detail, f"{step.seconds:.0f} s")
        lines.append(f"| {' | '.join(cells)} |")
    for step in steps.done:
        if step.more:
            lines += ["", f"## {step.name}", "", *(f"    {line}" for line in step.more)]
    path = FOLDER / f"{steps.target}.md"
    write_file(path, ("\n".join(lines) + "\n").encode())
    return path
