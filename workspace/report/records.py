# SPDX-License-Identifier: Apache-2.0
"""The records of both benches, each with its file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from custom_kernels.bench import compare
from custom_kernels.bench import record as kernels
from pydantic import ValidationError

from workspace.bench import record as engine
from workspace.bench.report import arrival
from workspace.fork.tree_state import shown
from workspace.host.text import plural

NEWEST = 60
"""So many records are shown, so that a page stays small."""


@dataclass(frozen=True)
class Engine:
    """A record of `make bench`."""

    path: Path
    record: engine.Record
    speed: compare.Ratio | None
    """Of the second variant, above 1 for faster; None if the run is not valid."""

    @property
    def time(self) -> str:
        return self.record.started

    @property
    def card(self) -> str:
        return _card(self.record.device)

    @property
    def title(self) -> str:
        run, settings = self.record, self.record.settings
        names = [variant.name for variant in run.variants]
        pair = " against ".join(reversed(names)) if names != ["stock", "custom"] else None
        kernels = settings.quantization or settings.backend
        model = run.model.name.rpartition("/")[2]
        metric = f"{settings.metric}{arrival(settings)}"
        parts = (model, metric, kernels, settings.layers, pair, self.card)
        return ", ".join(part for part in parts if part)

    @property
    def workload(self) -> tuple[object, ...]:
        """What is equal in runs whose figures vary alike."""
        names = (
            *("metric", "input_len", "output_len", "num_prompts", "request_rate", "eager"),
            "parallel",
        )
        settings = (getattr(self.record.settings, name) for name in names)
        return (self.record.model.name, self.record.device, *settings)


@dataclass(frozen=True)
class Kernels:
    """A record of `make bench-kernels`."""

    path: Path
    record: kernels.Record

    @property
    def time(self) -> str:
        return self.record.provenance.time

    @property
    def card(self) -> str:
        return _card(self.record.provenance.device)

    @property
    def title(self) -> str:
        run = self.record
        return f"{run.operation}, {run.dtype}, against {run.baseline}, {self.card}"


def _card(device: str) -> str:
    """Without maker, memory and a count of one."""
    return re.sub(r"^1 x |NVIDIA | \d+GB.*", "", device)


def read(path: Path) -> Engine | Kernels:
    """A record of either bench, of any version.

    Raises:
        RecordError: it is none.
    """
    if "comparison" not in kernels.read_json(path):
        return Kernels(path, kernels.read(path))
    try:
        run = engine.read(path)
    except ValidationError as error:
        raise kernels.damaged(path, error) from error
    (speed,) = compare.read(path).ratios.values() if run.valid else (None,)
    return Engine(path, run, speed)


def find(folders: Iterable[Path]) -> tuple[list[Engine | Kernels], list[str]]:
    """The records in these folders, the newest first, and a line per file that is left out."""
    records: list[Engine | Kernels] = []
    left_out: list[str] = []
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        try:
            records.append(read(path))
        except kernels.RecordError as error:
            left_out.append(str(error).replace(str(path), shown(path)))
    records.sort(key=lambda one: one.time, reverse=True)
    if older := records[NEWEST:]:
        left_out.append(plural(len(older), "older record"))
    return records[:NEWEST], left_out
