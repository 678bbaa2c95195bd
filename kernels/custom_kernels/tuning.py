# SPDX-License-Identifier: Apache-2.0
"""Tuning results: which backend, and which settings of it, were measured to be best on a GPU.

They are data, a small JSON file per operation and GPU, found at run time:

- ``<cache folder>/tuning/<operation>/<gpu>.json``, the user's own, goes first;
- ``<operation>/tuning/<gpu>.json`` in this package, measured where the package was made.

What a file says of a layer replaces what a later one says of it. A file that cannot be read, is of
another schema, or was measured on another GPU is ignored with one warning.

Schema 1::

    {"schema": 1,
     "operation": "gemm",
     "gpu": "NVIDIA H200",
     "provenance": [{"torch": ..., "driver": ..., "git_commit": ..., "git_dirty": ...,
                     "kernel_source_hash": ..., "time": ..., "command": ...}],
     "choices": [{"dtype": "bfloat16", "N": 896, "K": 896, "bias": false,
                  "ranges": [[1, 16, "skinny"], [32, 8192, "cublaslt"]], "provenance": 0}],
     "settings": {"triton": [{"dtype": "bfloat16", "N": 896, "K": 896, "M": [1, 16],
                              "values": {"block_n": 64, ...}, "provenance": 0}]}}

``provenance`` is a list, and entries name theirs by its index. A range holds the first and the last
M that were measured, and covers what lies between: nothing is extrapolated. A backend other than
the operation's first preference is in a range only where it was surely faster than that one (see
``surely_faster``); what no range covers goes by the order of preference.

``python -m custom_kernels.tuning RECORD.json`` makes such a file from the record of a benchmark
(``python -m custom_kernels.bench``).
"""

import argparse
import functools
import json
import logging
import re
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from custom_kernels import build, records

if TYPE_CHECKING:
    import torch

SCHEMA = 1

MARGIN = 0.01
"""By how much a backend must surely be faster than the preferred one to be taken instead."""

PROVENANCE = (
    "device",
    "driver",
    "torch",
    "cuda",
    "git_commit",
    "git_dirty",
    "kernel_source_hash",
    "time",
    "command",
)
"""What of a record's provenance is kept."""

Range = tuple[int, int, str]
"""First M, last M, backend."""
Tuning = dict[str, Any]

log = logging.getLogger(__name__)


class TuningError(RuntimeError):
    """A record from which nothing can be learnt. The message is one line."""


# --- looking up -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1 << 16)
def backend(
    operation: str, device: "torch.device", dtype: "torch.dtype", m: int, **layer: int | bool
) -> str:
    """The backend to run: the measured one where there is a measurement for this GPU, layer and M,
    else the first by the operation's order of preference that runs there and takes the dtype.

    Cached, so that a call of an operation costs one look-up.
    """
    from custom_kernels import registry

    if device.type == "cuda":
        chosen = measured(operation, _gpu(device), _name(dtype), m, layer)
        if chosen is not None and _runs(operation, chosen, device):
            return chosen
    return registry.best(operation, device, dtype)


def measured(
    operation: str, gpu: str, dtype: str, m: int, layer: Mapping[str, int | bool]
) -> str | None:
    """The backend that the files for ``gpu`` name, None if they do not cover this layer and M."""
    ranges = _choices(operation, gpu).get(_key(dtype, layer), ())
    return next((name for first, last, name in ranges if first <= m <= last), None)


@functools.lru_cache(maxsize=1 << 16)
def settings(
    operation: str,
    name: str,
    device: "torch.device",
    dtype: "torch.dtype",
    m: int,
    **layer: int | bool,
) -> dict[str, Any] | None:
    """What the files say of a backend's settings for this GPU, layer and M; None if nothing."""
    if device.type != "cuda":
        return None
    for file in _files(operation, _gpu(device)):
        for entry in file["settings"].get(name, ()):
            first, last = entry["M"]
            same = all(entry[key] == value for key, value in layer.items())
            if same and entry["dtype"] == _name(dtype) and first <= m <= last:
                values: dict[str, Any] = entry["values"]
                return values
    return None


def forget() -> None:
    """Read the files again at the next look-up."""
    for cached in (backend, settings, _choices, _files, _runs):
        cached.cache_clear()


def paths(operation: str, gpu: str) -> list[Path]:
    """Where the files for a GPU are looked for, the first to go first."""
    name = re.sub(r"\W+", "-", gpu).strip("-") + ".json"
    return [
        build.cache_dir() / "tuning" / operation / name,
        build.PACKAGE / operation / "tuning" / name,
    ]


@functools.cache
def _choices(operation: str, gpu: str) -> dict[tuple[Any, ...], tuple[Range, ...]]:
    found: dict[tuple[Any, ...], tuple[Range, ...]] = {}
    for file in _files(operation, gpu):
        for entry in file["choices"]:
            layer = {k: v for k, v in entry.items() if k not in ("dtype", "ranges", "provenance")}
            ranges = tuple((first, last, name) for first, last, name in entry["ranges"])
            found.setdefault(_key(entry["dtype"], layer), ranges)
    return found


@functools.cache
def _files(operation: str, gpu: str) -> tuple[Tuning, ...]:
    found = []
    for path in paths(operation, gpu):
        try:
            found.append(read(path, operation, gpu))
        except FileNotFoundError:
            continue
        except (OSError, TuningError) as error:
            log.warning("%s: no tuning is taken from %s: %s", operation, path, error)
    return tuple(found)


def read(path: Path, operation: str, gpu: str) -> Tuning:
    """Read a tuning file. Raises TuningError unless it is one, for this operation and GPU."""
    try:
        file = json.loads(path.read_text())
    except ValueError as error:
        raise TuningError(f"it is not JSON: {error}") from None
    if not isinstance(file, dict) or file.get("schema") != SCHEMA:
        raise TuningError(f"it is not of schema {SCHEMA}")
    if (file.get("operation"), file.get("gpu")) != (operation, gpu):
        raise TuningError(f"it is for {file.get('operation')} on {file.get('gpu')}, not on {gpu}")
    try:
        for entry in file["choices"]:
            assert isinstance(entry["dtype"], str)
            for first, last, name in entry["ranges"]:
                assert isinstance(name, str)
                assert 1 <= int(first) <= int(last)
        for entries in file["settings"].values():
            for entry in entries:
                first, last = entry["M"]
                assert isinstance(entry["dtype"], str)
                assert isinstance(entry["values"], dict)
                assert 1 <= int(first) <= int(last)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise TuningError(f"an entry is damaged ({error!r})") from None
    return file


@functools.cache
def _runs(operation: str, name: str, device: "torch.device") -> bool:
    from custom_kernels import registry

    reason = registry.available(operation, name, device)
    if reason is not None:
        log.warning(
            "%s: %s was measured to be faster but cannot run here: %s", operation, name, reason
        )
    return reason is None


@functools.cache
def _gpu(device: "torch.device") -> str:
    import torch

    return torch.cuda.get_device_name(device)


def _name(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


def _key(dtype: str, layer: Mapping[str, int | bool]) -> tuple[Any, ...]:
    return dtype, *sorted(layer.items())


# --- adopting -------------------------------------------------------------------------------------


def adopt(record: records.Record | Path, path: Path | None = None) -> list[str]:
    """Keep what a record of a benchmark shows, in the user's own file for that GPU (or in
    ``path``), beside what is there of other layers. Returns what was kept, a line per layer.

    Raises TuningError if the record has nothing to choose from, records.RecordError if it is none.
    """
    if isinstance(record, Path):
        record = records.read(record)
    operation, gpu = record["operation"], str(record["provenance"]["device"])
    path = path or paths(operation, gpu)[0]
    new = choices(record)
    try:
        file = read(path, operation, gpu)
    except FileNotFoundError:
        file = {"choices": [], "settings": {}, "provenance": []}
    except TuningError as error:
        raise TuningError(f"{path} is in the way: {error}; move it away") from None

    source = {name: record["provenance"].get(name) for name in PROVENANCE}
    replaced = {_entry_key(entry) for entry in new}
    kept = [entry for entry in file["choices"] if _entry_key(entry) not in replaced]
    index = len(file["provenance"])
    merged = {
        "schema": SCHEMA,
        "operation": operation,
        "gpu": gpu,
        "provenance": [*file["provenance"], source],
        "choices": [*kept, *({**entry, "provenance": index} for entry in new)],
        "settings": file["settings"],
    }
    records.write_whole(path, lambda beside: _write(beside, merged))
    forget()
    return [f"{path}: {len(new)} layers", *map(_line, new)]


def choices(record: records.Record) -> list[dict[str, Any]]:
    """Per layer of a record the ranges of M and the backend for each, see the module's schema."""
    operation = record["operation"]
    definition = import_module(f"custom_kernels.{operation}.cases")
    layer_of = getattr(definition, "layer_of", None)
    if layer_of is None:
        raise TuningError(f"{operation} has no choice that is tuned: its cases have no layer_of")
    preference = import_module(f"custom_kernels.{operation}").PREFERENCE["cuda"][0]
    ours = [name for name in record["backends"] if name != preference]

    layers: dict[tuple[Any, ...], dict[int, str]] = {}
    described: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in record["rows"]:
        layer = layer_of(row["labels"])
        incumbent = row["contenders"].get(preference, {})
        if layer is None or incumbent.get("ratio") is None:
            continue
        faster = [
            (row["contenders"][name]["us"], name)
            for name in ours
            if surely_faster(row["contenders"].get(name, {}), incumbent)
        ]
        key = _key(record["dtype"], layer)
        described[key] = {"dtype": record["dtype"], **layer}
        layers.setdefault(key, {})[int(row["labels"]["M"])] = (
            min(faster)[1] if faster else preference
        )
    if not layers:
        raise TuningError(
            f"no row of the record has a time of {preference}, with which others are compared"
        )
    return [
        {**described[key], "ranges": [list(item) for item in ranges(found)]}
        for key, found in layers.items()
    ]


def surely_faster(one: Mapping[str, Any], incumbent: Mapping[str, Any]) -> bool:
    """Whether the whole confidence interval of one ratio to the baseline lies above the other's, by
    ``MARGIN``."""
    if one.get("low") is None or incumbent.get("high") is None:
        return False
    return bool(one["low"] > (1 + MARGIN) * incumbent["high"])


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
    return _key(entry["dtype"], layer)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m custom_kernels.tuning RECORD.json``: keep what a benchmark's record shows."""
    parser = argparse.ArgumentParser(
        prog="python -m custom_kernels.tuning", description=main.__doc__
    )
    parser.add_argument("record", type=Path)
    parser.add_argument(
        "--output", type=Path, help="the file to write (default: the user's own for that GPU)"
    )
    options = parser.parse_args(arguments)
    try:
        lines = adopt(options.record, options.output)
    except (OSError, TuningError, records.RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # who reads our output may stop: `| head`
    sys.exit(main())
