# SPDX-License-Identifier: Apache-2.0
"""How far stock vLLM is from itself on this machine: what BASELINE=self measures, the band that a
later verdict has to leave, and how far processes are apart, which narrows a later interval."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from workspace.bench.compare import spread
from workspace.bench.record import Noise, Record, read

AGAIN = "again"
"""The name of the second variant of such a run."""
KEPT = 40
"""So many of the newest runs count."""


def runs(results: Path, like: Record) -> Iterator[Record]:
    """The valid runs of stock against itself in a folder, the newest first, with the device, model,
    metric and kind of engine of ``like``."""
    for path in sorted(results.glob("*.json"), reverse=True):
        if f'"{AGAIN}"' not in path.read_text():
            continue
        try:
            found = read(path)
        except ValidationError:  # of another version of the workspace
            continue
        if found.valid and found.variants[1].name == AGAIN and _setting(found) == _setting(like):
            yield found


def _setting(record: Record) -> tuple[object, ...]:
    settings = record.settings
    rate = settings.request_rate
    engine = (settings.metric, rate, settings.parallel, settings.eager)
    return record.device, record.model.name, *engine


def of_runs(found: Iterable[Record]) -> Noise | None:
    """The largest of their ratios, up or down, and how far their processes were; None if none."""
    newest = list(islice(found, KEPT))
    if not newest:
        return None
    ratios = [abs(math.log(one.comparison.ratio)) for one in newest]
    spreads = [spread(one.by_process) for one in newest]
    return Noise(
        runs=len(ratios),
        band=math.expm1(max(ratios)),
        squares=sum(squares for squares, _ in spreads),
        freedom=sum(freedom for _, freedom in spreads),
    )
