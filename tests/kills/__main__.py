# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.kills`: faults until so many were had, a line for each promise not kept."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from tests.kills import runner, scene
from tests.kills.cases import CASES
from tests.kills.runner import KINDS, Kind, Runner
from tests.workspace.conftest import ODD


def main(
    faults: Annotated[int, typer.Option(help="how many in all")] = 1000,
    cases: Annotated[
        list[str] | None, typer.Option(help="verbs or cases; without it all but the slow ones")
    ] = None,
    kinds: Annotated[str, typer.Option(help="of " + ",".join(KINDS))] = "kill",
    seed: Annotated[int | None, typer.Option(help="repeats a run; without it a random one")] = None,
    slow: Annotated[bool, typer.Option(help="cases that take minutes, too")] = False,
) -> None:
    """Kill verbs, fill their disk or make it read-only, at random moments."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # mounts go in any end
    console = Console(stderr=True)
    asked = cast("list[Kind]", [kind for kind in KINDS if kind in kinds.split(",")])
    seed = int.from_bytes(os.urandom(3)) if seed is None else seed
    chosen = runner.chosen(cases or [], slow=slow)
    if not chosen or not asked:
        sys.exit(f"error: use --cases of {', '.join(case.name for case in CASES)}")
    console.print(f"--seed {seed}; making the scene")
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as place, Progress(*columns, console=console) as progress:
        folder = Path(place) / ODD
        folder.mkdir(parents=True)
        made = Runner(scene.make_checkout(folder), folder, lambda line: console.print(
            line, markup=False, highlight=False, soft_wrap=True
        ))  # fmt: skip
        task = progress.add_task("faults", total=faults)
        try:
            for done in runner.spread(made, chosen, asked, faults, seed):
                progress.update(task, completed=done)
                if not console.is_terminal:
                    console.print(f"{done} of {faults}")
        except KeyboardInterrupt:
            console.print("interrupted")
    table = Table("case", "fault", "count", title=f"{sum(made.counts.values())} faults")
    for (case, kind), count in sorted(made.counts.items()):
        table.add_row(case, kind, str(count))
    console.print(table)
    if made.found:
        sys.exit(f"error: {len(made.found)} promises were not kept")


if __name__ == "__main__":
    typer.run(main)
