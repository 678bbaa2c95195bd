# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.bench.compare A.json B.json``: is B faster than A, slower, the same,
or can the records not tell?

Two runs on different days meet different clocks, so no time of the one is compared with a time of
the other. Each run has measured its own baseline, block by block, and what is compared is how far
each is ahead of it: change = ratio in B / ratio in A, above 1 if B is faster. Its 95 % interval
joins those of the two ratios, which are independent: the logarithms' deviations add in quadrature.

Works for records of kernel benchmarks, row by row, and for records of the engine bench, whose one
ratio is custom / stock. Needs neither torch nor a GPU. Exits with 1 if a file cannot be used.
"""

import argparse
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from custom_kernels.bench import records
from custom_kernels.bench.records import COLOURS, VERDICTS, RecordError

DIFFERENT_FROM = 0.02
"""Twice what one run calls different: what a run cannot see of itself (where the allocator put
things, which chip of its kind it was) differs between two."""
SAME_WITHIN = 0.03

Key = tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One ratio of a record: how far ahead of its own baseline, above 1 is faster."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Side:
    """What of a record is compared."""

    kind: str
    """``kernels`` or ``engine``."""
    entries: dict[tuple[Key, str], Entry]
    """By labels and contender."""
    facts: dict[str, str]
    """What should be equal in both: device, dtype, baseline, versions."""
    warnings: list[str]


@dataclass(frozen=True)
class Change:
    """One row: B against A."""

    labels: Key
    contender: str
    before: Entry
    after: Entry
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """FASTER or SLOWER: the 95 % CI is more than 2 % off. SAME: it is within 3 %."""
        return verdict(self.low, self.high)


@dataclass(frozen=True)
class Comparison:
    """B against A."""

    changes: list[Change]
    ratio: float
    """Geometric mean of the changes."""
    low: float
    high: float
    notes: list[str]
    """What differs between the records beside the kernels, and what was left out."""

    @property
    def verdict(self) -> str:
        return verdict(self.low, self.high)


def verdict(low: float, high: float) -> str:
    """FASTER, SLOWER, SAME or AMBIGUOUS for an interval of a change."""
    if low > 1 + DIFFERENT_FROM:
        return "FASTER"
    if high < 1 - DIFFERENT_FROM:
        return "SLOWER"
    return "SAME" if low >= 1 - SAME_WITHIN and high <= 1 + SAME_WITHIN else "AMBIGUOUS"


def compare(a: Side, b: Side) -> Comparison:
    """Compare what both have. Raises RecordError if that is nothing."""
    if a.kind != b.kind:
        raise RecordError(f"A is a record of the {a.kind} bench and B of the {b.kind} bench")
    notes = [
        f"{name} differs: {a.facts.get(name, '?')} in A, {b.facts.get(name, '?')} in B"
        for name in dict.fromkeys([*a.facts, *b.facts])
        if a.facts.get(name) != b.facts.get(name)
    ]
    notes += [f"{name}: {text}" for name, side in (("A", a), ("B", b)) for text in side.warnings]
    before, after = a.entries, b.entries
    ours_a, ours_b = ({contender for _, contender in side} for side in (before, after))
    if not ours_a & ours_b and len(ours_a) == len(ours_b) == 1:
        (old,), (new,) = ours_a, ours_b
        notes.append(f"the contenders differ: {old} in A, {new} in B")
        name = f"{old} -> {new}"
        before = {(labels, name): entry for (labels, _), entry in before.items()}
        after = {(labels, name): entry for (labels, _), entry in after.items()}
    common = [key for key in before if key in after]
    if not common:
        raise RecordError(
            "the records have no shape and contender in common: A has "
            f"{_some(before)}, B has {_some(after)}"
        )
    for name, here, there in (("A", before, after), ("B", after, before)):
        if only := len(here.keys() - there.keys()):
            notes.append(f"{only} of {len(here)} rows are in {name} only and left out")
    changes = [_change(*key, before[key], after[key]) for key in common]
    return Comparison(changes, *_mean(changes), notes=notes)


def _change(labels: Key, contender: str, before: Entry, after: Entry) -> Change:
    ratio = after.ratio / before.ratio
    down = math.hypot(_log(after.ratio, after.low), _log(before.high, before.ratio))
    up = math.hypot(_log(after.high, after.ratio), _log(before.ratio, before.low))
    return Change(
        labels, contender, before, after, ratio, ratio * math.exp(-down), ratio * math.exp(up)
    )


def _mean(changes: Sequence[Change]) -> tuple[float, float, float]:
    """Geometric mean and its interval; the rows' deviations are independent."""
    count = len(changes)
    mean = math.exp(sum(math.log(change.ratio) for change in changes) / count)
    down = math.hypot(*(_log(change.ratio, change.low) for change in changes)) / count
    up = math.hypot(*(_log(change.high, change.ratio) for change in changes)) / count
    return mean, mean * math.exp(-down), mean * math.exp(up)


def _log(upper: float, lower: float) -> float:
    return math.log(upper / lower)


def _some(entries: dict[tuple[Key, str], Entry]) -> str:
    if not entries:
        return "no ratio at all"
    labels, contender = next(iter(entries))
    more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
    return f"{contender} at {' '.join(labels)}{more}"


# --- reading --------------------------------------------------------------------------------------


def read(path: Path) -> Side:
    """A record of either bench. Raises RecordError."""
    content = records.read_json(path)
    try:
        side = _engine(content) if "comparison" in content else _kernels(records.read(path))
    except RecordError as error:
        raise RecordError(
            f"{path}: {error}" if str(path) not in str(error) else str(error)
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{path} is not a whole record: {error!r}") from error
    if not side.entries:
        raise RecordError(f"{path} holds no ratio: nothing was measured against its baseline")
    if bad := [
        key
        for key, entry in side.entries.items()
        if not 0 < entry.low <= entry.ratio <= entry.high < math.inf
    ]:
        raise RecordError(f"{path}: the ratio of {bad[0][1]} is not a number with an interval")
    return side


def _kernels(record: records.Record) -> Side:
    provenance = record["provenance"]
    entries = {
        (records.label_words(row["labels"]), name): Entry(
            float(one["ratio"]), float(one["low"]), float(one["high"])
        )
        for row in record["rows"]
        for name, one in row["contenders"].items()
        if one.get("ratio") is not None
    }
    warnings = [f"{len(record['failures'])} failures"] if record["failures"] else []
    if record.get("warnings"):
        warnings.append(f"{len(record['warnings'])} warnings, the first: {record['warnings'][0]}")
    return Side(
        kind="kernels",
        entries=entries,
        facts={
            "operation": record["operation"],
            "device": str(provenance.get("device")),
            "dtype": record["dtype"],
            "baseline": record["baseline"],
            "torch": str(provenance.get("torch")),
            "driver": str(provenance.get("driver")),
        },
        warnings=warnings,
    )


def _engine(record: dict[str, Any]) -> Side:
    if not record["valid"]:
        raise RecordError(f"the run is not valid: {'; '.join(record['failures'])}")
    settings, found = record["settings"], record["comparison"]
    stock, custom = (variant["name"] for variant in record["variants"])
    low, high = found["interval"]
    entry = Entry(float(found["ratio"]), float(low), float(high))
    if record["unit"] == "s":  # seconds: less is faster
        entry = Entry(1 / entry.ratio, 1 / high, 1 / low)
    model = record["model"]
    return Side(
        kind="engine",
        entries={((str(settings["metric"]), str(model["name"])), custom): entry},
        facts={
            "device": record["device"],
            "baseline": stock,
            "dtype": model["dtype"],
            "weights": model["weights"],
            **{
                name: str(settings[name])
                for name in ("backend", "input_len", "output_len", "num_prompts", "eager")
            },
            "tensor_parallel": str(settings["tensor_parallel"]),
            **{name: str(settings.get(name)) for name in ("layers", "quantization")},
        },
        warnings=[f"{found['verdict']}: {found['because']}"]
        if found["verdict"] == "ambiguous"
        else [],
    )


# --- the command ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two files and print what changed. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m custom_kernels.bench.compare", description=__doc__
    )
    parser.add_argument("a", type=Path, metavar="A", help="the record before")
    parser.add_argument("b", type=Path, metavar="B", help="the record after")
    options = parser.parse_args(arguments)
    try:
        result = compare(read(options.a), read(options.b))
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report(result)
    return 0


def report(result: Comparison) -> None:
    """Print a comparison: what differs, a line per row, the verdict."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    for note in result.notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("row")
    table.add_column("contender")
    for name in ("A / its baseline", "B / its baseline", "B / A", "95 % interval"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for change in result.changes:
        table.add_row(
            " ".join(change.labels),
            change.contender,
            f"{change.before.ratio:.3f}",
            f"{change.after.ratio:.3f}",
            f"{change.ratio:.3f}",
            f"{change.low:.3f}-{change.high:.3f}",
            _coloured(change.verdict),
        )
    console.print(table)
    counts = [change.verdict for change in result.changes]
    words = ", ".join(f"{counts.count(name)} {name.lower()}" for name in VERDICTS if name in counts)
    console.print(
        f"B against A: {_coloured(result.verdict)}, geometric mean {result.ratio:.3f} "
        f"({result.low:.3f}-{result.high:.3f}) over {len(counts)} rows: {words}"
    )


def _coloured(word: str) -> str:
    colour = COLOURS.get(word)
    return f"[{colour}]{word}[/]" if colour else word


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader may close the pipe: `| head`
    sys.exit(main())
