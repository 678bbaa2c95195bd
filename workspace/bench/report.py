# SPDX-License-Identifier: Apache-2.0
"""What the user sees: live progress while it runs, a table at the end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from workspace.bench import layers
from workspace.bench.checks import Agreement
from workspace.bench.record import Record, VariantRecord
from workspace.paths import ROOT
from workspace.words import plural

console = Console(highlight=False, soft_wrap=True)

COLOURS = {"faster": "green", "slower": "red", "same": "cyan", "ambiguous": "yellow"}


def say(text: str) -> None:
    console.print(escape(text))


class Live:
    """Progress of a run: which process, which step, for how long.

    On a terminal one line that changes; elsewhere one line for each process that has ended.
    """

    def __init__(self, processes: int, bar: Progress | None) -> None:
        self._processes = processes
        self._bar = bar
        self._task: TaskID | None = None
        self._title = ""
        self._begin = 0.0

    def start(self, number: int, variant: str) -> None:
        self._title = f"{number}/{self._processes} {variant}"
        self._begin = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(self._title, total=None)

    def step(self, text: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{self._title}: {text}")

    def end(self) -> None:
        text = f"{self._title}: done in {time.monotonic() - self._begin:.0f} s"
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._bar.console.print(f"  {text}")
        else:
            console.print(f"  {text}")


@contextmanager
def progress(processes: int) -> Iterator[Live]:
    """Show progress over so many processes."""
    if not console.is_terminal:
        yield Live(processes, None)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield Live(processes, bar)


def show(record: Record, path: Path, picture: Path) -> None:
    """Print the table, the verdict, the proofs and where everything is."""
    console.print(table(record))
    for variant in record.variants:
        for line in layer_lines(variant):
            console.print(escape(line))
    ratio = record.comparison
    names = [variant.name for variant in record.variants]
    low, high = ratio.interval
    colour = COLOURS[ratio.verdict]
    console.print(
        f"{names[1]} / {names[0]} = [bold]{ratio.ratio:.3f}[/bold] [dim]\\[{low:.3f}, {high:.3f}]"
        f"[/dim]: [bold {colour}]{ratio.verdict}[/bold {colour}] ({ratio.because})"
    )
    if record.note:
        console.print(f"[yellow]{record.note}[/yellow]")
    if record.agreement.lossy:
        far = distance_line(record.agreement)
        console.print(f"distance of {names[1]} from {names[0]}, a figure and no proof: {far}")
    else:
        console.print(f"outputs: {agreement_line(record.agreement)}")
    itself = (record.baseline_with_itself, record.candidate_with_itself)
    for name, found in zip(names, itself, strict=True):
        if found is not None:
            console.print(f"[dim]{name} against itself: {agreement_line(found)}[/dim]")
    for failure in record.failures:
        console.print(f"[bold red]INVALID[/bold red] {escape(failure)}")
    console.print(f"record:  {escape(shown(path))}")
    console.print(f"picture: {escape(shown(picture))}")
    console.print(f"again:   {escape(record.command)}")


def table(record: Record) -> Table:
    """The figures of both variants."""
    settings, model = record.settings, record.model
    seed = f" (seed {model.seed})" if model.seed is not None else ""
    title = (
        f"{model.name}, [bold]{model.weights} weights{seed}[/bold], {model.dtype}, "
        f"{escape(record.device)}, TP {settings.tensor_parallel}, "
        f"{'eager' if settings.eager else 'compiled'}"
    )
    caption = (
        f"a round: {plural(settings.num_prompts, 'request')}, "
        f"{settings.input_tokens_per_round} tokens in, {settings.output_tokens_per_round} out; "
        f"{plural(settings.repeats, 'process')} a variant, {plural(settings.rounds, 'round')} each"
    )
    result = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    result.add_column("variant")
    result.add_column(f"{settings.metric}, {record.unit}", justify="right")
    result.add_column("lowest", justify="right")
    result.add_column("highest", justify="right")
    result.add_column("kernels of ours that ran", justify="right")
    for variant in record.variants:
        figures = (variant.median, variant.lowest, variant.highest)
        result.add_row(variant.name, *(number(f, record.unit) for f in figures), launched(variant))
    return result


def number(value: float, unit: str) -> str:
    """A figure for reading: 12,345 tokens/s or 0.1234 s."""
    return f"{value:,.0f}" if unit == "tokens/s" else f"{value:.4f}"


def launched(variant: VariantRecord) -> str:
    """ "gemm.reference: 1,234 launches in 2 processes", or "none"."""
    if not variant.launches:
        return "none"
    count = sum(len(process.launches) for process in variant.processes)
    parts = [f"{name}: {launches:,}" for name, launches in variant.launches.items()]
    return f"{', '.join(parts)} launches in {plural(count, 'process')}"


def layer_lines(variant: VariantRecord) -> list[str]:
    """What ran in which layers of this variant, a line for each kind of layer."""
    workers = [counted for process in variant.processes for counted in process.layers.values()]
    if not workers:
        return []
    kinds = layers.kinds(layers.total(workers))
    widths = [
        max(len(text) for text in texts)
        for texts in zip(*((k.name, k.kernel) for k in kinds), strict=True)
    ]
    lines = [f"layers of {variant.name}, calls in {plural(len(workers), 'process')}:"]
    for kind in kinds:
        line = (
            f"  {kind.name:{widths[0]}}  {kind.kernel:{widths[1]}}  {plural(kind.layers, 'layer')}"
        )
        if kind.most:
            each = " each" if kind.layers > 1 else ""
            calls = f"{kind.fewest:,}"
            calls += f" to {kind.most:,}" if kind.most > kind.fewest else ""
            line += f", {calls} calls{each}"
        lines.append(line)
    return lines


def agreement_line(agreement: Agreement) -> str:
    """How far the outputs agree, in one line."""
    diverged = f", {plural(agreement.diverged, 'prompt')} parted" if agreement.diverged else ""
    if diverged and agreement.passed:
        diverged += " at a near tie"
    return (
        f"{agreement.matched} of {agreement.tokens} greedy tokens match{diverged}; "
        f"log-probabilities differ by at most {agreement.largest:.3f} "
        f"(allowed {agreement.allowed_largest:g}), "
        f"{agreement.mean:.4f} on average (allowed {agreement.allowed_mean:g})"
    )


def distance_line(agreement: Agreement) -> str:
    """How far the outputs of a lossy variant are from those of stock."""
    return (
        f"{agreement.matched} of {agreement.tokens} greedy tokens match, each prompt up to its "
        f"first that does not; log-probabilities differ by at most {agreement.largest:.3f}, "
        f"{agreement.mean:.4f} on average"
    )


def shown(path: Path) -> str:
    """A path relative to the checkout where it lies in it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
