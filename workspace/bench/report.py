# SPDX-License-Identifier: Apache-2.0
"""What the user sees: progress while it runs, a table at the end."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from custom_kernels.bench.intervals import COLOURS
from rich.console import Console
from rich.markup import escape
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from workspace.bench import layers, operations
from workspace.bench.messages import Event
from workspace.bench.plan import Plan
from workspace.bench.record import Agreement, Comparison, Record, Settings, Unit, VariantRecord
from workspace.bench.time_left import TimeLeft
from workspace.environment.progress import LoggedProgress
from workspace.fork.tree_state import shown
from workspace.host.text import duration, plural
from workspace.verbs import Bench

console = Console(highlight=False, soft_wrap=True)

FEW = 100
"""Of fewer requests than that, the 99th percentile lies between the two slowest."""


def line(text: str) -> None:
    console.print(escape(text))


def announce(plan: Plan, options: Bench, seconds: float | None) -> None:
    """Print the workload, how long it takes (None: unknown) and which variables change it."""
    names = ("input_len", "output_len", "num_prompts", "repeats", "rounds")
    given = [name.upper() for name in names if getattr(options, name)]
    values = " ".join(f"{name.upper()}={getattr(plan, name)}" for name in names)
    origin = "given" if len(given) == len(names) else "chosen for this model and machine"
    if given and len(given) < len(names):
        origin = f"{', '.join(given)} given, the others {origin}"
    line(f"workload: {values} ({origin}; set any of them to change it)")
    processes = plural(2 * plan.repeats, "process")
    if seconds is None:
        line(f"time:     known after the first of {processes}")
    else:
        line(f"time:     about {duration(seconds)} for {processes}")


class Live:
    """Progress of a run: which process, which step, how much longer it takes."""

    def __init__(self, variants: Sequence[str], progress: LoggedProgress, clock: TimeLeft) -> None:
        self.clock = clock
        self._variants = variants
        self._progress = progress
        self._task = progress.add_task("", total=None, visible=False)
        self._number = 0
        self._step = ""
        self._begin = time.monotonic()

    def start(self) -> None:
        """The next process starts."""
        self._number += 1
        self._begin = time.monotonic()
        self.clock.start(self._begin)
        self._step = "starting"
        self._progress.reset(self._task, visible=True, description=self._line(self._begin))

    def step(self, event: Event | None) -> None:
        """A step begins, or (None) time has passed."""
        now = time.monotonic()
        if event is not None:
            self.clock.step(event, now)
            self._step = str(event)
        self._progress.update(self._task, description=self._line(now))

    def end(self, rounds: int) -> None:
        """The process has ended; from now on `rounds` are measured per process."""
        now = time.monotonic()
        self.clock.end(now)
        self._step = f"done in {now - self._begin:.0f} s"
        if rounds < self.clock.rounds:
            self._step += f", {rounds} rounds of {self.clock.rounds} because time is short"
        self.clock.rounds = rounds
        self._progress.update(self._task, visible=False)
        console.print(f"  {self._line(now)}")

    def _line(self, now: float) -> str:
        text = (
            f"{self._number}/{len(self._variants)} {self._variants[self._number - 1]}: {self._step}"
        )
        left = self.clock.left(now)
        if left is None:
            return f"{text}, time left known after the first process"
        return f"{text}, about {duration(left)} left" if left > 0 else text


@contextmanager
def progress(variants: Sequence[str], clock: TimeLeft) -> Iterator[Live]:
    """Show progress over processes of these variants."""
    columns = (SpinnerColumn(), TextColumn("  {task.description}"), TimeElapsedColumn())
    with LoggedProgress(*columns, console=console) as shown_progress:
        yield Live(variants, shown_progress, clock)


def show(record: Record, path: Path, plot: Path) -> None:
    """Print the table, the verdict, the proofs and the paths."""
    console.print(table(record))
    for text in lines(record):
        console.print(text)
    for failure in record.failures:
        console.print(f"[bold red]INVALID[/bold red] {escape(failure)}")
    console.print(f"record:  {escape(shown(path))}")
    console.print(f"plot:    {escape(shown(plot))}")
    console.print(f"re-run:  {escape(record.command)}")


def lines(record: Record) -> Iterator[str]:
    """What ran for which tokens and layers, the verdict and the proofs, in Rich's markup."""
    for variant in record.variants:
        for counted in (token_lines(variant), layer_lines(variant)):
            if counted:
                yield escape("\n".join(counted))
    told = all(variant.processes[0].attention for variant in record.variants)
    if told and operations.ATTENTION in (record.settings.op or ""):
        yield attention_line(record.variants)
    ratio = record.comparison
    names = [variant.name for variant in record.variants]
    yield f"{names[1]} / {names[0]} = {_ratio(ratio)} ({ratio.because})"
    if ratio.noise:
        yield (
            f"noise here: stock against itself within ±{ratio.noise.band:.1%} "
            f"in {plural(ratio.noise.runs, 'run')} of BASELINE=self"
        )
    if record.figures:
        yield "\n".join(figure_lines(record))
    if record.note:
        yield f"[yellow]{record.note}[/yellow]"
    if record.agreement.lossy:
        what = f"distance of {names[1]} from {names[0]}, not a proof"
    else:
        what = "outputs"
    yield f"{what}: {agreement_line(record.agreement)}"
    repeated = (record.baseline_with_itself, record.candidate_with_itself)
    for name, agreement in zip(names, repeated, strict=True):
        if agreement is not None:
            yield f"[dim]{name} against itself: {agreement_line(agreement)}[/dim]"


def table(record: Record) -> Table:
    """The figures of both variants, as a table."""
    settings, model = record.settings, record.model
    seed = f" (seed {model.seed})" if model.seed is not None else ""
    stored = f"{model.quantized}, " if model.quantized else ""
    title = (
        f"{model.name}, [bold]{model.weights} weights{seed}[/bold], {stored}{model.dtype}, "
        f"{escape(record.device)}, {settings.parallel}, "
        f"{'eager' if settings.eager else 'compiled'}"
    )
    caption = (
        f"per round: {plural(settings.num_prompts, 'request')}{arrival(settings)}, "
        f"{settings.input_tokens_per_round} tokens in, {settings.output_tokens_per_round} out; "
        f"{plural(settings.repeats, 'process')} per variant, "
        f"{plural(settings.rounds, 'round')} each"
    )
    result = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    result.add_column("variant")
    for name in (record.measured, "lowest", "highest", "custom kernel launches"):
        result.add_column(name, justify="right")
    for variant in record.variants:
        figures = (variant.median, variant.lowest, variant.highest)
        launches = launched(variant.launches, sum(len(p.launches) for p in variant.processes))
        result.add_row(variant.name, *(number(f, record.unit) for f in figures), launches)
    return result


def arrival(settings: Settings) -> str:
    """When the requests of METRIC=serve arrive, after their number."""
    if settings.metric != "serve":
        return ""
    rate = settings.request_rate
    return " at once" if rate is None else f" at {rate:g}/s"


def figure_lines(record: Record) -> list[str]:
    """The other figures of METRIC=serve with their verdicts, a line each, in Rich's markup."""
    names = [variant.name for variant in record.variants]
    requests = record.settings.num_prompts
    few = ", of which the 99th percentile is nearly the slowest" if requests < FEW else ""
    lines = [
        f"clients, medians over {plural(len(record.variants[0].figures), 'round')} of "
        f"{plural(requests, 'request')}{few}:"
    ]
    width = max(len(figure.name) for figure in record.figures)
    for figure in record.figures:
        sides = zip(names, figure.medians, strict=True)
        text = ", ".join(f"{name} {number(value, figure.unit)}" for name, value in sides)
        text = f"  {figure.name:{width}}  {text} {figure.unit}"
        lines.append(f"{text}, ratio {_ratio(figure.comparison)}" if figure.comparison else text)
    return lines


def _ratio(found: Comparison) -> str:
    low, high = found.interval
    colour = COLOURS[found.verdict]
    return (
        f"[bold]{found.ratio:.3f}[/bold] [dim]\\[{low:.3f}, {high:.3f}][/dim]: "
        f"[bold {colour}]{found.verdict}[/bold {colour}]"
    )


def number(value: float, unit: Unit) -> str:
    """A figure for reading: 12,345 or 1.23 tokens/s, 0.1234 s, 12.3 ms."""
    if unit == "s":
        return f"{value:.4f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def launched(launches: Mapping[str, int], processes: int) -> str:
    """ "gemm.reference: 1,234 in 2 processes", or "none"."""
    if not launches:
        return "none"
    parts = [f"{name}: {count:,}" for name, count in launches.items()]
    return f"{', '.join(parts)} in {plural(processes, 'process')}"


def token_lines(variant: VariantRecord) -> list[str]:
    """The kernels that ran for few and for many tokens, one line per kernel."""
    workers = [counted for process in variant.processes for counted in process.tokens.values()]
    if not workers:
        return []
    ranges: dict[str, Counter[tuple[int, int]]] = {}
    for counted in workers:
        for kernel, calls in counted.items():
            for most, count in calls.items():
                ranges.setdefault(kernel, Counter())[_range(most)] += count
    lines = [f"tokens in a call of {variant.name}, calls in {plural(len(workers), 'process')}:"]
    width = max(map(len, ranges))
    for kernel, counts in sorted(ranges.items()):
        texts = (
            f"{first:,} to {last:,}: {counts[first, last]:,}" for first, last in sorted(counts)
        )
        lines.append(f"  {kernel:{width}}  {', '.join(texts)}")
    return lines


def _range(tokens: int) -> tuple[int, int]:
    """The range in which a bucket is shown: 1 to 16, 17 to 64, 65 to 256, and so on."""
    first, last = 1, 16
    while last < tokens:
        first, last = last + 1, last * 4
    return first, last


def layer_lines(variant: VariantRecord) -> list[str]:
    """The kernels that ran in this variant's layers, one line per kind of layer."""
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
        text = (
            f"  {kind.name:{widths[0]}}  {kind.kernel:{widths[1]}}  {plural(kind.layers, 'layer')}"
        )
        if kind.most:
            most = f" to {kind.most:,}" if kind.most > kind.fewest else ""
            text += f", {kind.fewest:,}{most} calls{' each' if kind.layers > 1 else ''}"
        lines.append(text)
    return lines


def attention_line(variants: Sequence[VariantRecord]) -> str:
    """Which attention of vLLM each variant has; the second does not decode by it."""
    backends = (
        f"{', '.join(variant.processes[0].attention)} in {variant.name}" for variant in variants
    )
    return f"vLLM's own attention: {'; '.join(backends)} (there it does not decode)"


def agreement_line(agreement: Agreement) -> str:
    """How far the outputs agree; for a lossy variant, without the bounds that do not apply."""
    bounds = (agreement.allowed_largest, agreement.allowed_mean)
    allowed = [f" (allowed {bound:g})" for bound in bounds]
    diverged = f", {plural(agreement.diverged, 'prompt')} diverged" if agreement.diverged else ""
    if agreement.lossy:
        allowed = ["", ""]
    elif diverged and agreement.passed:
        diverged += " at a near tie"
    return (
        f"{agreement.matched} of {agreement.tokens} greedy tokens match{diverged}; "
        f"log-probabilities differ by at most {agreement.largest:.3f}{allowed[0]}, "
        f"{agreement.mean:.4f} on average{allowed[1]}"
    )
