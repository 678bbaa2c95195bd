# SPDX-License-Identifier: Apache-2.0
"""The record of a kernel benchmark: its models, and how it is written and read.

docs/measuring.md describes the fields. Older records are read as what they would be today: those
of schema 1 (one backend against one baseline), and verdicts in capital letters. Nothing here needs
torch or a GPU.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from custom_kernels import paths
from custom_kernels.bench.intervals import Verdict
from custom_kernels.command import UsageError, write_whole

Labels = dict[str, str | int]


def _lower(verdict: object) -> object:
    return verdict.lower() if isinstance(verdict, str) else verdict


StoredVerdict = Annotated[Verdict, BeforeValidator(_lower)]


class RecordError(UsageError):
    """A file that is no usable record. The message is one line."""


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_by_name=True, ser_json_inf_nan="constants"
    )


class Rates(_Strict):
    """What was reached, and how much that is of what the device can do; None where that was not
    measured. The roofline is the longer of the time for the bytes at copy speed and the time for
    the operations at the matmul peak."""

    tflops: float
    gbytes_per_second: float
    percent_of_copy: float | None = None
    percent_of_matmul: float | None = None
    percent_of_roofline: float | None = None


class Timed(Rates):
    """One contender at one case: microseconds per call, over all blocks."""

    us: float
    """The median."""
    p20: float
    p80: float
    error: float
    """The largest seen in the checks."""
    ratio: float | None = None
    """Median over blocks of baseline time / own time: above 1 it is faster. None for the baseline,
    and for all if the baseline has no times."""
    low: float | None = None
    high: float | None = None
    """95 % confidence interval of the ratio."""
    repetitions: list[float] = []
    """The ratio in each repetition alone."""
    blocks: int
    verdict: StoredVerdict | None = None

    @property
    def comparison(self) -> tuple[float, float, float] | None:
        """The ratio and both ends of its interval, if it has them."""
        if self.ratio is None or self.low is None or self.high is None:
            return None
        return self.ratio, self.low, self.high


class Failed(_Strict):
    """A contender without times, and why."""

    failure: str


class ClockState(_Strict):
    """What the driver says of the clocks while a case is measured."""

    sm_mhz: tuple[int, int] | None = None
    """The lowest and the highest SM clock seen."""
    reasons: list[str] = []
    """Why the driver held it down."""
    unknown: str | None = None
    """Why nothing is known."""


class Row(_Strict):
    """One case, all contenders; the first is the baseline."""

    labels: Labels
    flops: float
    bytes: float
    peak: str
    """The dtype whose matmul peak is the ceiling."""
    input_sets: int
    """Sets of rotating buffers that a replay goes through."""
    rounds: int
    """How often it goes through them."""
    cold: bool
    """Whether the sets are together large enough that every call finds a cold L2."""
    clocks: ClockState
    contenders: dict[str, Timed | Failed]
    calls: int | None = None
    """How often a captured run called it, if the case comes from a capture."""

    def timed(self, name: str) -> Timed | None:
        """This contender, unless it failed or was not measured."""
        found = self.contenders.get(name)
        return found if isinstance(found, Timed) else None


class Ceilings(_Strict):
    """What the device reached at best, in the same run."""

    bytes_per_second: float
    """A large device-to-device copy, bytes read plus bytes written."""
    flops_per_second: dict[str, float]
    """An 8192-cubed dense product of random numbers through torch, per dtype: the best of some. A
    kernel can be above it, where torch's is not as fast as the chip or the chip was warmer."""
    missing: dict[str, str] = {}
    """Dtypes whose product this device or torch cannot do, and why."""


class Summary(_Strict):
    """The ratios of one contender to the baseline, over many cases."""

    shapes: int
    geometric_mean: float
    lowest: float
    highest: float
    verdicts: dict[StoredVerdict, int]


class Captured(_Strict):
    """The capture from which the cases come: its file, and how many shapes it has of this
    operation. Those that were measured are about this share of the cost of all calls."""

    file: str
    shapes: int
    share: float


class Weighted(_Strict):
    """All calls of a captured run, at the measured shapes: time of the baseline / time of this
    contender. The interval is that of all calls if those of all shapes hold, so at least 95 %."""

    ratio: float
    low: float
    high: float
    shapes: int
    """At which both have a time."""
    missing: list[str]
    """Labels of measured shapes at which this contender has none."""


class Library(_Strict):
    """The compiled library of a backend."""

    library: str
    architectures: list[str]


class Provenance(_Strict):
    """Sources, versions and machine of a run; None for what could not be read."""

    time: str
    command: str
    """What repeats the run."""
    device: str
    sms: int | None = Field(None, validation_alias=AliasChoices("sms", "multiprocessors"))
    memory_bytes: int | None = None
    l2_bytes: int | None = None
    driver: str | None = None
    torch: str | None = None
    cuda: str | None = None
    python: str | None = None
    packages: dict[str, str] = {}
    git_commit: str | None = None
    git_dirty: bool | None = None
    locks: dict[str, str] = {}
    """File name -> SHA-256."""
    kernel_source_hash: str | None = None
    compiled: dict[str, Library] = {}
    tool_chain: dict[str, str] = {}


class Record(_Strict):
    """One run of ``python -m custom_kernels.bench``."""

    schema_version: Annotated[
        Literal[2], Field(validation_alias="schema", serialization_alias="schema")
    ] = 2
    operation: str
    dtype: str
    baseline: str
    """What ratios are against."""
    backends: list[str]
    """The contenders of this package."""
    baselines: list[str]
    """The others."""
    skipped: dict[str, str]
    """Contender -> why it was not measured."""
    ceilings: Ceilings
    summary: dict[str, dict[str, Summary]]
    """By contender, then by model or ``all``."""
    captured: Captured | None = None
    weighted: dict[str, Weighted] = {}
    """By contender, if the cases come from a capture."""
    failures: list[str]
    warnings: list[str]
    provenance: Provenance
    rows: list[Row]


# --- derived figures ------------------------------------------------------------------------------


def rates(us: float, flops: float, size: float, peak: str, ceilings: Ceilings | None) -> Rates:
    """The rates of one call.

    Args:
        us: microseconds of the call.
        flops: its operations.
        size: bytes that it must move.
        peak: the dtype whose matmul peak is the ceiling.
    """
    seconds = us * 1e-6
    reached = {"tflops": flops / seconds / 1e12, "gbytes_per_second": size / seconds / 1e9}
    if ceilings is not None:
        copied = size / ceilings.bytes_per_second
        reached |= {
            "percent_of_copy": 100 * copied / seconds, "percent_of_roofline": 100 * copied / seconds
        }  # fmt: skip
        if matmul := ceilings.flops_per_second.get(peak):
            multiplied = flops / matmul
            reached["percent_of_matmul"] = 100 * multiplied / seconds
            reached["percent_of_roofline"] = 100 * max(copied, multiplied) / seconds
    return Rates.model_validate(reached)


def summary(rows: Sequence[Row], baseline: str) -> dict[str, dict[str, Summary]]:
    """By contender, over all rows and by model."""
    found: dict[str, dict[str, list[Timed]]] = {}
    for row in rows:
        for name in row.contenders:
            timed = row.timed(name)
            if name != baseline and timed and timed.ratio is not None:
                model = str(row.labels.get("model", "all"))
                found.setdefault(name, {}).setdefault(model, []).append(timed)
    for groups in found.values():
        if len(groups) > 1:
            groups["all"] = [timed for group in groups.values() for timed in group]
    return {
        name: {group: _summarize(members) for group, members in groups.items()}
        for name, groups in found.items()
    }


def weighted(rows: Sequence[Row], baseline: str) -> dict[str, Weighted]:
    """By contender, over the calls of a captured run.

    Of a shape with c calls of t µs, the baseline takes c · t · ratio in all.
    """
    found: dict[str, Weighted] = {}
    for name in dict.fromkeys(name for row in rows for name in row.contenders if name != baseline):
        timed = {label_text(row.labels): (row, row.timed(name)) for row in rows}
        sums = [
            ((row.calls or 0) * one.us, one.comparison)
            for row, one in timed.values()
            if one is not None and one.comparison is not None
        ]
        if sums:
            whole = sum(us for us, _ in sums)
            ratio, low, high = (
                sum(us * ratios[side] for us, ratios in sums) / whole for side in range(3)
            )
            missing = [label for label, (_, one) in timed.items() if one is None]
            found[name] = Weighted(
                ratio=ratio, low=low, high=high, shapes=len(sums), missing=missing
            )
    return found


def label_text(labels: Labels) -> str:
    """``qwen2.5-7b qkv M=16 N=4608 K=3584``."""
    return " ".join(
        f"{name}={value}" if len(name) == 1 else str(value) for name, value in labels.items()
    )


def _summarize(measured: Sequence[Timed]) -> Summary:
    ratios = [one.ratio for one in measured if one.ratio is not None]
    verdicts = [one.verdict for one in measured]
    return Summary(
        shapes=len(ratios),
        geometric_mean=math.exp(sum(map(math.log, ratios)) / len(ratios)),
        lowest=min(ratios),
        highest=max(ratios),
        verdicts={name: verdicts.count(name) for name in get_args(Verdict) if name in verdicts},
    )


# --- files ----------------------------------------------------------------------------------------


def results_folder() -> Path:
    """Where records go by default; git ignores it."""
    return (paths.checkout() or Path.cwd()) / "benchmarks" / "results"


def write(record: Record, folder: Path) -> Path:
    """Write a record to a new file in ``folder``; returns its path."""
    stamp = record.provenance.time.replace(":", "").replace("+0000", "Z")
    path = folder / f"kernels-{record.operation}-{record.dtype}-{stamp}.json"
    text = record.model_dump_json(indent=1, by_alias=True) + "\n"
    write_whole(path, lambda partial: partial.write_text(text))
    return path


def read(path: Path) -> Record:
    """Read the record of a kernel benchmark, of any schema.

    Raises:
        RecordError: it is none.
    """
    content = read_json(path)
    if "rows" not in content or "operation" not in content:
        raise RecordError(f"{path} is not the record of a kernel benchmark")
    schema = content.get("schema", 1)
    if schema not in (1, 2):
        raise RecordError(f"{path} is of schema {schema}, which this version does not know")
    try:
        return Record.model_validate(content if schema == 2 else _upgrade(content))
    except ValidationError as error:
        raise damaged(path, error) from error
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path} is not a whole record: {error!r}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        RecordError: it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # also what is not UTF-8
        raise RecordError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path} is not a record: it is no JSON object")
    return content


def damaged(path: Path, error: ValidationError) -> RecordError:
    """The first thing that is wrong with a record, in one line."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return RecordError(f"{path} is not a whole record: {where}: {first['msg']}")


def _upgrade(old: Mapping[str, Any]) -> dict[str, Any]:
    """A record of schema 1 as schema 2."""
    dtype, ours, base, peaks = old["dtype"], old["backend"], old["baseline"], old["ceilings"]
    ceilings = Ceilings(
        bytes_per_second=peaks["bytes_per_second"],
        flops_per_second={dtype: peaks["flops_per_second"]},
    )
    rows = [_upgraded_row(row, ours, base, dtype, ceilings) for row in old["rows"]]
    return {
        **{name: old[name] for name in ("operation", "dtype", "baseline", "failures")},
        "backends": [ours],
        "baselines": [base],
        "skipped": {},
        "ceilings": ceilings,
        "summary": summary(rows, base),
        "warnings": [],
        "provenance": old["provenance"],
        "rows": rows,
    }


def _upgraded_row(
    old: Mapping[str, Any], ours: str, base: str, dtype: str, ceilings: Ceilings
) -> Row:
    seconds = old["custom_us"]["median"] * 1e-6
    flops, size = old["tflops"] * 1e12 * seconds, old["gbytes_per_second"] * 1e9 * seconds

    def timed(times: Mapping[str, Any], **comparison: Any) -> Timed:
        us, spread = times["median"], {name: times[name] for name in ("p20", "p80", "error")}
        reached = rates(us, flops, size, dtype, ceilings).model_dump()
        return Timed(us=us, blocks=old["blocks"], **spread, **reached, **comparison)

    return Row(
        labels={name: old[name] for name in ("model", "layer", "M", "N", "K")},
        flops=flops,
        bytes=size,
        peak=dtype,
        input_sets=old["input_sets"],
        rounds=1,
        cold=True,
        clocks=ClockState(unknown="not recorded"),
        contenders={
            base: timed(old["baseline_us"]),
            ours: timed(
                old["custom_us"],
                ratio=old["ratio"],
                low=old["ratio_low"],
                high=old["ratio_high"],
                verdict=old["verdict"],
            ),
        },
    )
