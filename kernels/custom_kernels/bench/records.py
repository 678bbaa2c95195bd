# SPDX-License-Identifier: Apache-2.0
"""The JSON record of a kernel benchmark: what it holds, how it is written, read and shown.

docs/measuring.md describes the schema. Records of schema 1 (one backend against one baseline)
are read as what they would be today. Nothing here needs torch or a GPU.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from custom_kernels import paths

if TYPE_CHECKING:
    from custom_kernels.bench.device import Ceilings
    from custom_kernels.bench.timing import Measurement, Result

SCHEMA = 2
VERDICTS = ("FASTER", "SAME", "AMBIGUOUS", "SLOWER")
COLOURS = {"FASTER": "green", "SLOWER": "red", "AMBIGUOUS": "yellow"}

Record = dict[str, Any]


class RecordError(RuntimeError):
    """A file that is no usable record. The message is one line."""


def label_words(labels: dict[str, Any]) -> tuple[str, ...]:
    """``("qwen2.5-7b", "qkv", "M=16")``."""
    return tuple(
        f"{name}={value}" if len(name) == 1 else str(value) for name, value in labels.items()
    )


def row(measurement: "Measurement", limits: "Ceilings") -> dict[str, Any]:
    """One case of a record."""
    case = measurement.case
    return {
        "labels": case.labels,
        "flops": case.flops,
        "bytes": case.bytes,
        "peak": case.peak,
        "input_sets": measurement.sets,
        "rounds": measurement.rounds,
        "cold": measurement.cold,
        "clocks": measurement.clocks,
        "contenders": {
            name: _contender(result, case.flops, case.bytes, case.peak, limits)
            for name, result in measurement.results.items()
        },
    }


def _contender(
    result: "Result", flops: float, size: float, peak: str, limits: "Ceilings"
) -> dict[str, Any]:
    if result.times is None:
        return {"failure": result.failure}
    return {
        "us": result.times.median,
        "p20": result.times.p20,
        "p80": result.times.p80,
        "error": result.error,
        "ratio": result.ratio,
        "low": result.low,
        "high": result.high,
        "repetitions": list(result.repetitions),
        "blocks": result.blocks,
        "verdict": result.verdict,
        **rates(
            result.times.median * 1e-6,
            flops,
            size,
            limits.bytes_per_second,
            limits.flops_per_second.get(peak),
        ),
    }


def rates(
    seconds: float, flops: float, size: float, copy: float, matmul: float | None
) -> dict[str, float | None]:
    """What was reached, and how much that is of what the device can do; None without a measured
    matmul peak. The roofline is the longer of the time for the bytes at copy speed and the time for
    the operations at the matmul peak."""
    floor = size / copy if matmul is None else max(size / copy, flops / matmul)
    return {
        "tflops": flops / seconds / 1e12,
        "gbytes_per_second": size / seconds / 1e9,
        "percent_of_copy": 100 * size / seconds / copy,
        "percent_of_matmul": None if matmul is None else 100 * flops / seconds / matmul,
        "percent_of_roofline": 100 * floor / seconds,
    }


def summary(rows: Sequence[dict[str, Any]], baseline: str) -> dict[str, Any]:
    """Per contender, over all rows and per model: geometric mean, lowest and highest ratio, and how
    many rows got which verdict."""
    names = dict.fromkeys(name for row in rows for name in row["contenders"] if name != baseline)
    return {name: groups for name in names if (groups := _groups(rows, name))}


def _groups(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        measured = row["contenders"].get(name, {})
        if measured.get("ratio") is not None:
            groups.setdefault(str(row["labels"].get("model", "all")), []).append(measured)
    if len(groups) > 1:
        groups["all"] = [measured for group in groups.values() for measured in group]
    return {group: _summarize(members) for group, members in groups.items()}


def _summarize(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    ratios = [one["ratio"] for one in measured]
    verdicts = [one["verdict"] for one in measured]
    return {
        "shapes": len(ratios),
        "geometric_mean": math.exp(sum(map(math.log, ratios)) / len(ratios)),
        "lowest": min(ratios),
        "highest": max(ratios),
        "verdicts": {name: verdicts.count(name) for name in VERDICTS if name in verdicts},
    }


# --- files ----------------------------------------------------------------------------------------


def results_folder() -> Path:
    """Where records go that nobody asked to keep; git ignores it."""
    return (paths.checkout() or Path.cwd()) / "benchmarks" / "results"


def write(record: Record, folder: Path) -> Path:
    """Write a record under a name of its own; a kill leaves no half of one."""
    stamp = record["provenance"]["time"].replace(":", "").replace("+0000", "Z")
    path = folder / f"kernels-{record['operation']}-{record['dtype']}-{stamp}.json"

    def save(beside: Path) -> None:
        beside.write_text(json.dumps(record, indent=1) + "\n")

    write_whole(path, save)
    return path


def write_whole(path: Path, save: Callable[[Path], None]) -> None:
    """Let ``save`` write a file beside ``path``, and rename it into place when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        save(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: Path) -> Record:
    """Read the record of a kernel benchmark, of any schema. Raises RecordError if it is none."""
    record = read_json(path)
    if "rows" not in record or "operation" not in record:
        raise RecordError(f"{path} is not the record of a kernel benchmark")
    try:
        return upgrade(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{path} is not a whole record: {error!r}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises RecordError."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # also what is not UTF-8
        raise RecordError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path} is not a record: it holds no JSON object")
    return content


def upgrade(record: Record) -> Record:
    """A record of an older schema as it would be written today; a current one as it is.

    Raises ValueError for a schema from the future, KeyError if something is missing.
    """
    schema = record.get("schema", 1)
    if schema == SCHEMA:
        for one in record["rows"]:
            _ = one["labels"], one["contenders"]
        _ = record["baseline"], record["ceilings"]["flops_per_second"], record["provenance"]
        return record
    if schema != 1:
        raise ValueError(f"schema {schema} is not known here")
    ceilings, dtype = record["ceilings"], record["dtype"]
    ours, base = record["backend"], record["baseline"]
    rows = [_upgraded_row(one, ours, base, dtype, ceilings) for one in record["rows"]]
    return {
        "schema": SCHEMA,
        "operation": record["operation"],
        "dtype": dtype,
        "baseline": base,
        "backends": [ours],
        "baselines": [base],
        "skipped": {},
        "ceilings": {
            "bytes_per_second": ceilings["bytes_per_second"],
            "flops_per_second": {dtype: ceilings["flops_per_second"]},
            "missing": {},
        },
        "summary": summary(rows, base),
        "failures": record["failures"],
        "warnings": [],
        "provenance": record["provenance"],
        "rows": rows,
    }


def _upgraded_row(
    old: dict[str, Any], ours: str, base: str, dtype: str, ceilings: dict[str, Any]
) -> dict[str, Any]:
    labels = {name: old[name] for name in ("model", "layer", "M", "N", "K")}
    seconds = old["custom_us"]["median"] * 1e-6
    flops, size = old["tflops"] * 1e12 * seconds, old["gbytes_per_second"] * 1e9 * seconds

    def side(times: dict[str, Any], ratios: dict[str, Any]) -> dict[str, Any]:
        return {
            "us": times["median"],
            "p20": times["p20"],
            "p80": times["p80"],
            "error": times["error"],
            **ratios,
            **rates(
                times["median"] * 1e-6,
                flops,
                size,
                ceilings["bytes_per_second"],
                ceilings["flops_per_second"],
            ),
        }

    none = {"ratio": None, "low": None, "high": None, "verdict": None}
    return {
        "labels": labels,
        "flops": flops,
        "bytes": size,
        "peak": dtype,
        "input_sets": old["input_sets"],
        "rounds": 1,
        "cold": True,
        "clocks": {"unknown": "not recorded"},
        "contenders": {
            base: side(old["baseline_us"], {**none, "blocks": old["blocks"]}),
            ours: side(
                old["custom_us"],
                {
                    "ratio": old["ratio"],
                    "low": old["ratio_low"],
                    "high": old["ratio_high"],
                    "repetitions": [],
                    "blocks": old["blocks"],
                    "verdict": old["verdict"],
                },
            ),
        },
    }


# --- on a screen ----------------------------------------------------------------------------------


def headline(record: Record) -> str:
    """What was measured, where, and what the device can do."""
    limits = record["ceilings"]
    peaks = [
        f"{rate / 1e12:.0f} TFLOP/s {name}" for name, rate in limits["flops_per_second"].items()
    ]
    products = f", multiplies {', '.join(peaks)}" if peaks else ""
    return (
        f"{record['operation']} {record['dtype']} on {record['provenance'].get('device', '?')}, "
        f"baseline {record['baseline']}: copies {limits['bytes_per_second'] / 1e12:.2f} TB/s"
        f"{products} (measured in this run)"
    )


def table(record: Record) -> Any:
    """A rich table: a line per case and contender, the case named once."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    names = list(dict.fromkeys(name for row in record["rows"] for name in row["labels"]))
    shown = Table(header_style="bold", pad_edge=False, box=SIMPLE_HEAD)
    for name in names:
        shown.add_column(name, justify="right" if len(name) == 1 else "left")
    shown.add_column("contender")
    for name in ("µs", "p20-p80", "TFLOP/s", "GB/s", "% copy", "% matmul", "% roofline", "ratio"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("verdict")
    for row in record["rows"]:
        labels = [str(row["labels"].get(name, "")) for name in names]
        for place, (name, measured) in enumerate(row["contenders"].items()):
            shown.add_row(
                *(labels if place == 0 else [""] * len(names)),
                name,
                *_cells(measured, name == record["baseline"]),
            )
    return shown


def _cells(measured: dict[str, Any], is_baseline: bool) -> Iterable[str]:
    if "failure" in measured:
        from rich.markup import escape

        return [*[""] * 8, f"[red]{escape(str(measured['failure']))}[/]"]
    verdict = measured["verdict"]
    colour = COLOURS.get(verdict)
    ratio = measured["ratio"]
    interval = f"{measured['low']:.3f}-{measured['high']:.3f}" if ratio is not None else ""
    return [
        _short(measured["us"]),
        f"{_short(measured['p20'])}-{_short(measured['p80'])}",
        *(
            _short(measured[name])
            for name in (
                "tflops",
                "gbytes_per_second",
                "percent_of_copy",
                "percent_of_matmul",
                "percent_of_roofline",
            )
        ),
        "1" if is_baseline else "" if ratio is None else f"{ratio:.3f} ({interval})",
        "baseline" if is_baseline else f"[{colour}]{verdict}[/]" if colour else str(verdict or ""),
    ]


def _short(value: float | None) -> str:
    """Three figures or so: 0.82, 4.56, 45.6, 456, 4560."""
    if value is None:
        return ""
    places = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{places}f}"


def summary_lines(record: Record) -> list[str]:
    """A line per contender and model."""
    return [
        f"{name}, {group}: geometric mean {one['geometric_mean']:.3f} x {record['baseline']}, "
        f"{one['lowest']:.3f} to {one['highest']:.3f}, "
        + ", ".join(f"{count} {word.lower()}" for word, count in one["verdicts"].items())
        for name, groups in record["summary"].items()
        for group, one in groups.items()
    ]
