# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.bench.compare A.json B.json``: is B faster than A, slower, the same,
or ambiguous?

Two runs on different days meet different clocks, so times of different runs are not compared. Each
run has measured its own baseline, block by block, and how far each is ahead of it is compared:
change = ratio in B / ratio in A, above 1 if B is faster.

Works for records of kernel benchmarks, row by row, and for records of the engine bench, whose one
ratio is custom / stock. Needs neither torch nor a GPU. Exits with 1 if a file cannot be used.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from pydantic import BaseModel, ValidationError

from custom_kernels.bench import intervals, record
from custom_kernels.bench.intervals import Verdict, coloured
from custom_kernels.bench.record import RecordError, label_text
from custom_kernels.command import command, console, exit_with

if TYPE_CHECKING:
    from rich.table import Table

DIFFERENT_FROM = 0.02
"""Twice that of a single run: what is constant within a run (addresses, the chip) differs between
two."""
SAME_WITHIN = 0.03
SETTINGS = (  # of an engine run: what should be equal in both
    *("backend", "layers", "quantization", "input_len", "output_len", "num_prompts"),
    *("request_rate", "eager", "tensor_parallel"),
)
LATER_SETTINGS = {"pipeline_parallel": 1, "executor": "mp"}
"""With what they were in the records that do not have them."""

Key = tuple[str, str]
"""The labels of a case, and the contender."""


class Ratio(NamedTuple):
    """A ratio with its 95 % interval, above 1 for faster."""

    value: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """``1.038 [1.032, 1.043]``."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def below(self) -> float:
        """The lower end, as the logarithm's distance from the value."""
        return math.log(self.value / self.low)

    @property
    def above(self) -> float:
        """The upper end, likewise."""
        return math.log(self.high / self.value)

    @property
    def verdict(self) -> Verdict:
        """Of a change: faster or slower if the interval is more than 2 % off, same within 3 %."""
        return intervals.verdict(self.low, self.high, DIFFERENT_FROM, SAME_WITHIN)


@dataclass(frozen=True)
class Side:
    """What of a record is compared."""

    kind: Literal["kernels", "engine"]
    ratios: dict[Key, Ratio]
    """By row, how far the contender is ahead of its baseline."""
    facts: Mapping[str, str | None]
    """What should be equal in both: device, dtype, baseline, versions."""
    warnings: list[str]


@dataclass(frozen=True)
class Change:
    """One row: B against A."""

    labels: str
    contender: str
    before: Ratio
    after: Ratio

    @property
    def ratio(self) -> Ratio:
        """after / before: independent, so the deviations of the logarithms add in quadrature."""
        value = self.after.value / self.before.value
        down = math.hypot(self.after.below, self.before.above)
        up = math.hypot(self.after.above, self.before.below)
        return Ratio(value, value * math.exp(-down), value * math.exp(up))


@dataclass(frozen=True)
class Comparison:
    """B against A."""

    changes: list[Change]
    ratio: Ratio
    """Geometric mean of the changes."""
    notes: list[str]
    """What differs between the records beside the kernels, and what was left out."""


def compare(a: Side, b: Side) -> Comparison:
    """Compare what both have.

    Raises:
        RecordError: they have nothing in common.
    """
    if a.kind != b.kind:
        raise RecordError(
            f"A is a record of the {a.kind} bench and B of the {b.kind} bench; name two of one kind"
        )
    notes = [
        f"{name} differs: {a.facts.get(name) or '?'} in A, {b.facts.get(name) or '?'} in B"
        for name in dict.fromkeys([*a.facts, *b.facts])
        if a.facts.get(name) != b.facts.get(name)
    ]
    notes += [f"{name}: {text}" for name, side in (("A", a), ("B", b)) for text in side.warnings]
    before, after = a.ratios, b.ratios
    names_a, names_b = ({contender for _, contender in ratios} for ratios in (before, after))
    if not names_a & names_b and len(names_a) == len(names_b) == 1:
        (old,), (new,) = names_a, names_b
        notes.append(f"the contenders differ: {old} in A, {new} in B")
        before, after = (
            {(labels, f"{old} -> {new}"): ratio for (labels, _), ratio in ratios.items()}
            for ratios in (before, after)
        )
    common = [key for key in before if key in after]
    if not common:
        raise RecordError(
            "the records have no shape and contender in common: A has "
            f"{_some(before)}, B has {_some(after)}"
        )
    for name, ratios in (("A", before), ("B", after)):
        if only := len(ratios) - len(common):
            notes.append(f"{only} of {len(ratios)} rows are in {name} only and left out")
    changes = [Change(*key, before[key], after[key]) for key in common]
    return Comparison(changes, mean([change.ratio for change in changes]), notes)


def mean(ratios: Sequence[Ratio]) -> Ratio:
    """Geometric mean and its interval; the rows' deviations are independent."""
    count = len(ratios)
    mean = math.exp(sum(math.log(ratio.value) for ratio in ratios) / count)
    down = math.hypot(*(ratio.below for ratio in ratios)) / count
    up = math.hypot(*(ratio.above for ratio in ratios)) / count
    return Ratio(mean, mean * math.exp(-down), mean * math.exp(up))


def _some(ratios: dict[Key, Ratio]) -> str:
    if not ratios:
        return "no ratio at all"
    labels, contender = next(iter(ratios))
    more = f" and {len(ratios) - 1} more" if len(ratios) > 1 else ""
    return f"{contender} at {labels}{more}"


# --- reading --------------------------------------------------------------------------------------


class EngineVariant(BaseModel):
    name: str


class EngineComparison(BaseModel):
    ratio: float
    interval: tuple[float, float]
    verdict: Verdict
    because: str


class EngineRecord(BaseModel):
    """What is read of a record of ``make bench``."""

    settings: dict[str, str | int | float | None]
    model: dict[str, str | int | None]
    device: str
    unit: str
    variants: tuple[EngineVariant, EngineVariant]
    comparison: EngineComparison


def read(path: Path) -> Side:
    """A record of either bench.

    Raises:
        RecordError: it is none, or has no ratio.
    """
    content = record.read_json(path)
    if "comparison" not in content:
        side = kernels(record.read(path))
    elif not content.get("valid"):
        raise RecordError(f"{path}: the run is not valid: {'; '.join(content.get('failures', []))}")
    else:
        try:
            side = _engine(EngineRecord.model_validate(content))
        except ValidationError as error:
            raise record.damaged(path, error) from error
    if not side.ratios:
        raise RecordError(f"{path} has no ratio: nothing was measured against its baseline")
    for (_, name), ratio in side.ratios.items():
        if not 0 < ratio.low <= ratio.value <= ratio.high < math.inf:
            raise RecordError(f"{path}: the ratio of {name} is not a number with an interval")
    return side


def kernels(run: record.Record) -> Side:
    """Of a record of kernel benchmarks."""
    ratios = {
        (label_text(row.labels), name): Ratio(
            timed.ratio, timed.low or math.nan, timed.high or math.nan
        )
        for row in run.rows
        for name in row.contenders
        if (timed := row.timed(name)) and timed.ratio is not None
    }
    warnings = [f"{len(run.failures)} failures"] if run.failures else []
    if run.warnings:
        warnings.append(f"{len(run.warnings)} warnings, the first: {run.warnings[0]}")
    facts = {name: getattr(run, name) for name in ("operation", "dtype", "baseline")}
    facts |= {name: getattr(run.provenance, name) for name in ("device", "torch", "driver")}
    return Side("kernels", ratios, facts, warnings)


def _engine(run: EngineRecord) -> Side:
    stock, custom = run.variants
    found, (low, high) = run.comparison, run.comparison.interval
    ratio = Ratio(found.ratio, low, high)
    if not run.unit.endswith("/s"):  # a time, not a rate: less is faster
        ratio = Ratio(1 / found.ratio, 1 / high, 1 / low)
    facts = {"device": run.device, "baseline": stock.name}
    facts |= {name: str(run.model[name]) for name in ("dtype", "weights")}
    settings = {**dict.fromkeys(SETTINGS), **LATER_SETTINGS, **run.settings}
    facts |= {name: str(settings[name]) for name in (*SETTINGS, *LATER_SETTINGS)}
    labels = f"{run.settings['metric']} {run.model['name']}"
    ambiguous = found.verdict == "ambiguous"
    warnings = [f"{found.verdict}: {found.because}"] if ambiguous else []
    return Side("engine", {(labels, custom.name): ratio}, facts, warnings)


# --- the command ----------------------------------------------------------------------------------


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two files and print what changed. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m custom_kernels.bench.compare", description=__doc__
    )
    parser.add_argument("a", type=Path, metavar="A", help="the record before")
    parser.add_argument("b", type=Path, metavar="B", help="the record after")
    options = parser.parse_args(arguments)
    show(compare(read(options.a), read(options.b)))
    return 0


def show(result: Comparison) -> None:
    """Print a comparison: what differs, a line per row, the verdict."""
    screen = console(140)
    for note in result.notes:
        screen.print(f"note: {note}", style="yellow", markup=False)
    screen.print(table(result))
    screen.print(verdict_line(result))


def table(result: Comparison) -> "Table":
    """A line per row."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("row")
    shown.add_column("contender")
    for name in ("A / its baseline", "B / its baseline", "B / A", "95 % interval"):
        shown.add_column(name, justify="right")
    shown.add_column("verdict")
    for change in result.changes:
        shown.add_row(
            change.labels,
            change.contender,
            f"{change.before.value:.3f}",
            f"{change.after.value:.3f}",
            f"{change.ratio.value:.3f}",
            f"{change.ratio.low:.3f}-{change.ratio.high:.3f}",
            coloured(change.ratio.verdict),
        )
    return shown


def verdict_line(result: Comparison) -> str:
    """The verdict over all rows, in Rich's markup."""
    verdicts = [change.ratio.verdict for change in result.changes]
    counts = (f"{verdicts.count(name)} {name}" for name in get_args(Verdict) if name in verdicts)
    value, low, high = result.ratio
    return (
        f"B against A: {coloured(result.ratio.verdict)}, geometric mean {value:.3f} "
        f"({low:.3f}-{high:.3f}) over {len(verdicts)} row{'s' if len(verdicts) > 1 else ''}: "
        f"{', '.join(counts)}"
    )


if __name__ == "__main__":
    exit_with(main)
