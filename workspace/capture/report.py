# SPDX-License-Identifier: Apache-2.0
"""A capture on the screen: the calls that cost most."""

from pathlib import Path

from custom_kernels import command, registry
from custom_kernels.bench import shapes
from custom_kernels.check.case import Case
from rich.markup import escape
from rich.table import Table

from workspace.bench.layers import folded
from workspace.bench.report import console
from workspace.capture.record import Record
from workspace.fork.tree_state import shown
from workspace.host.text import make_command, plural

ROWS = 24
LABELS = ("model", "layer", "M")
"""Of a case, what has no place in the column of its shape."""


def show(record: Record, path: Path) -> None:
    """Print the table, what is not in it, and what to do with it."""
    command.console(140).print(table(record))
    first = record.workers[0]
    workers = plural(len(record.workers), "worker")
    console.print(
        f"{workers} of vLLM {first.vllm} on {escape(first.device)}, {plural(first.steps, 'step')}"
    )
    for kind, names in first.left_out.items():
        console.print(
            f"not described: {escape(kind)}: {', '.join(dict.fromkeys(map(folded, names)))}"
        )
    for failure in record.failures:
        console.print(f"[bold red]INVALID[/bold red] {escape(failure)}")
    console.print(f"record:  {escape(shown(path))}")
    console.print(f"re-run:  {escape(record.command)}")
    console.print(f"measure: {make_command('bench-kernels', K='gemm', SHAPES=shown(path))}")


def table(record: Record) -> Table:
    """The costliest calls of all workers, with their share of the cost of all."""
    calls = costs(record)
    whole = sum(cost for _, _, cost in calls)
    which = f"{ROWS} of {len(calls)} shapes" if len(calls) > ROWS else plural(len(calls), "shape")
    title = f"{record.workers[0].model}: {which}, by calls and the bytes or operations of each"
    found = Table(title=title, title_justify="left")
    for column in ("operation", "layer", "shape", "M", "calls", "cost"):
        right = column in ("M", "calls", "cost")
        found.add_column(column, justify="right" if right else "left", no_wrap=right)
    for operation, case, cost in calls[:ROWS]:
        shape = {name: value for name, value in case.labels.items() if name not in LABELS}
        found.add_row(
            operation,
            str(case.labels["layer"]),
            " ".join(f"{name}={value}" for name, value in shape.items()),
            str(case.labels["M"]),
            f"{case.calls:,}",
            f"{cost / whole:.1%}",
        )
    return found


def costs(record: Record) -> list[tuple[str, Case, float]]:
    """Operation, case and cost of every call, the costliest first."""
    operations = {layer.operation for worker in record.workers for layer in worker.layers}
    found: list[tuple[str, Case, float]] = []
    for operation in sorted(operations):
        # What vLLM computes on 8-bit weights costs here as if they were not.
        definition = registry.operation(operation.removeprefix("quantized_")).cases
        dtype = shapes.dtype_of(record, definition)
        cases = shapes.cases(record, definition, dtype, of=operation)
        found += [(operation, case, shapes.cost(case)) for case in cases]
    return sorted(found, key=lambda one: one[2], reverse=True)
