# SPDX-License-Identifier: Apache-2.0
"""Make a tuning file from the record of a benchmark (``python -m custom_kernels.bench``)."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from custom_kernels import registry, tuned
from custom_kernels.bench.record import Record, Timed
from custom_kernels.command import write_whole
from custom_kernels.tuned import Range, Tuning, TuningError, layer_key

MARGIN = 0.01
"""By how much a backend must be faster than the preferred one (95 % CI) to replace it."""

PROVENANCE = {
    *("device", "driver", "torch", "cuda", "git_commit", "git_dirty", "kernel_source_hash"),
    *("time", "command"),
}
"""What is kept of a record's provenance."""


def adopt(record: Record, path: Path | None = None) -> list[str]:
    """Keep what a record of a benchmark shows, in the user's own file for that GPU (or in
    ``path``), beside the entries of other layers. Returns what was kept, a line per layer.

    Raises:
        TuningError: the record has nothing to choose from, or ``path`` is not a tuning file.
    """
    operation, gpu = record.operation, record.provenance.device
    path = path or tuned.files(operation, gpu)[0]
    new = choices(record)
    try:
        file = tuned.read(path, operation, gpu)
    except FileNotFoundError:
        file: dict[str, Any] = {"choices": [], "settings": {}, "provenance": []}
    except TuningError as error:
        raise TuningError(f"{path} cannot be extended: {error}; move it away") from None

    source = record.provenance.model_dump(include=PROVENANCE)
    replaced = {_entry_key(entry) for entry in new}
    kept = [entry for entry in file["choices"] if _entry_key(entry) not in replaced]
    index = len(file["provenance"])
    merged = {
        "schema": tuned.SCHEMA,
        "operation": operation,
        "gpu": gpu,
        "provenance": [*file["provenance"], source],
        "choices": [*kept, *({**entry, "provenance": index} for entry in new)],
        "settings": file["settings"],
    }
    write_whole(path, lambda partial: _write(partial, merged))
    tuned.forget()
    return [f"{path}: {len(new)} layers", *map(_line, new)]


def choices(record: Record) -> list[dict[str, Any]]:
    """Per layer of a record the ranges of M and the backend for each, see ``tuned``'s schema."""
    operation = registry.operation(record.operation)
    layer_of = getattr(operation.cases, "layer_of", None)
    if layer_of is None:
        raise TuningError(f"{operation} has no choice that is tuned: its cases have no layer_of")
    preferred = operation.priority("cuda")[0]
    ours = [name for name in record.backends if name != preferred]

    layers: dict[tuple[Any, ...], dict[int, str]] = {}
    described: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in record.rows:
        layer, incumbent = layer_of(row.labels), row.timed(preferred)
        if layer is None or incumbent is None or incumbent.ratio is None:
            continue
        faster = [
            (timed.us, name)
            for name in ours
            if (timed := row.timed(name)) and surely_faster(timed, incumbent)
        ]
        key = layer_key(record.dtype, layer)
        described[key] = {"dtype": record.dtype, **layer}
        best = min(faster)[1] if faster else preferred
        layers.setdefault(key, {})[int(row.labels["M"])] = best
    if not layers:
        raise TuningError(
            f"no row of the record has a time of {preferred}, with which others are compared"
        )
    return [
        {**described[key], "ranges": [list(item) for item in ranges(found)]}
        for key, found in layers.items()
    ]


def surely_faster(one: Timed, incumbent: Timed) -> bool:
    """Whether the whole confidence interval of one ratio to the baseline lies above the other's, by
    ``MARGIN``."""
    if one.low is None or incumbent.high is None:
        return False
    return one.low > (1 + MARGIN) * incumbent.high


def ranges(chosen: Mapping[int, str]) -> list[Range]:
    """Neighbouring M with the same choice as one range: {1: "a", 2: "a", 4: "b"} gives 1-2 a,
    4-4 b."""
    found: list[Range] = []
    for m in sorted(chosen):
        if found and found[-1][2] == chosen[m]:
            found[-1] = (found[-1][0], m, chosen[m])
        else:
            found.append((m, m, chosen[m]))
    return found


def _entry_key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    layer = {k: v for k, v in entry.items() if k not in ("dtype", "ranges", "provenance")}
    return layer_key(entry["dtype"], layer)


def _write(path: Path, file: Tuning) -> None:
    """JSON with a line per entry, so that a diff shows which changed."""

    def lines(entries: Iterable[Any]) -> str:
        return ",\n  ".join(json.dumps(entry) for entry in entries)

    settings = ",\n  ".join(
        f"{json.dumps(name)}: [\n  {lines(entries)}]" for name, entries in file["settings"].items()
    )
    path.write_text(
        f'{{"schema": {file["schema"]},\n "operation": {json.dumps(file["operation"])},\n '
        f'"gpu": {json.dumps(file["gpu"])},\n "provenance": [\n  {lines(file["provenance"])}],\n '
        f'"choices": [\n  {lines(file["choices"])}],\n "settings": {{{settings}}}}}\n'
    )


def _line(entry: Mapping[str, Any]) -> str:
    layer = " ".join(
        f"{k}={v}" for k, v in entry.items() if k not in ("dtype", "ranges", "provenance")
    )
    spans = ", ".join(
        f"M {first}-{last}: {name}" if last > first else f"M {first}: {name}"
        for first, last, name in entry["ranges"]
    )
    return f"{entry['dtype']} {layer}: {spans}"
