# SPDX-License-Identifier: Apache-2.0
"""What the user sees of `make eval`: what is going to be scored, and a table at the end."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from workspace.bench import report
from workspace.eval.plan import Evaluation
from workspace.eval.record import Record
from workspace.fork.tree_state import shown
from workspace.host.text import duration, plural


def announce(evaluation: Evaluation) -> None:
    """Print what is compared, on what, and how long it takes."""
    sides = (evaluation.model, evaluation.against)
    names = [f"{side.model.name} ({side.quantized or 'unquantized'})" for side in sides]
    report.line(f"{names[0]} against {names[1]}")
    report.line(
        f"text:     {evaluation.tokens:,} tokens of {evaluation.text.name} in "
        f"{plural(len(evaluation.windows), 'window')} of {evaluation.window} (TEXT and TOKENS "
        "change it)"
    )
    seconds = evaluation.seconds
    if seconds is None:
        report.line("time:     known after the first of 2 processes")
    else:
        report.line(f"time:     about {duration(seconds)} for 2 processes")


def show(record: Record, path: Path) -> None:
    """Print the table, the ratio, and the paths."""
    report.console.print(table(record))
    for text in lines(record):
        report.console.print(text)
    for failure in record.failures:
        report.console.print(f"[bold red]INVALID[/bold red] {escape(failure)}")
    report.console.print(f"record:  {escape(shown(path))}")
    report.console.print(f"re-run:  {escape(record.command)}")


def table(record: Record) -> Table:
    """The perplexities of both sides."""
    text = record.text
    title = (
        f"perplexity of {escape(text.name)}, {text.tokens:,} tokens in "
        f"{plural(text.windows, 'window')} of {text.window}, {escape(record.device)}, "
        f"TP {record.tensor_parallel}"
    )
    result = Table(title=title, title_justify="left")
    for name in ("", "model", "weights"):
        result.add_column(name)
    for name in ("perplexity", "nats per token"):
        result.add_column(name, justify="right")
    for side in (record.against, record.model):
        result.add_row(
            side.name,
            escape(side.model.name),
            side.quantized or side.model.dtype,
            f"{side.perplexity:.4g}",
            f"{side.nats:.4f}",
        )
    return result


def lines(record: Record) -> Iterator[str]:
    """The kernels that ran, the ratio and what it says, in Rich's markup."""
    for side in (record.against, record.model):
        total = sum(map(Counter, side.launches.values()), Counter[str]())
        launched = report.launched(total, len(side.launches))
        yield f"[dim]custom kernel launches of {side.name}: {launched}[/dim]"
    low, high = record.comparison.interval
    colour, verdict = "yellow", "no difference can be told (95 % CI includes 1)"
    if low > 1:
        colour, verdict = "red", "worse (95 % CI excludes 1)"
    elif high < 1:
        colour, verdict = "green", "better (95 % CI excludes 1)"
    if record.note:
        yield f"[yellow]{escape(record.note)}[/yellow]"
    yield (
        f"model / against = [bold]{record.comparison.ratio:.4f}[/bold] [dim]\\[{low:.4f}, "
        f"{high:.4f}][/dim]: [bold {colour}]{verdict}[/bold {colour}]"
    )
