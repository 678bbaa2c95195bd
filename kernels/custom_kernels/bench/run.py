# SPDX-License-Identifier: Apache-2.0
"""Measure the cases of a plan, and make the record of it."""

from types import ModuleType

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from custom_kernels import registry
from custom_kernels.bench import device as bench_device
from custom_kernels.bench import timing
from custom_kernels.bench.plan import Plan, cases_of, contenders_of
from custom_kernels.bench.provenance import provenance
from custom_kernels.bench.record import Failed, Record, Row, label_text, summary, weighted


def run(plan: Plan, definition: ModuleType, device: torch.device) -> Record:
    """Measure every case of the plan on this GPU."""
    cases, captured = cases_of(plan, definition)
    screen = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    ) as progress:
        task = progress.add_task("compiling", total=len(cases))
        contenders, ours, skipped = contenders_of(plan, definition, device)
        progress.update(task, description="ceilings")
        ceilings = bench_device.ceilings(device, sorted({case.peak for case in cases}))
        exact = registry.operation(plan.operation).reference.exact
        rows: list[Row] = []
        problems: list[str] = []
        warm = False
        for case in cases:
            name = label_text(case.labels)
            progress.update(task, description=name)
            try:
                if not warm:
                    # The very first measurement of a process ran 8 % faster than all that
                    # followed (a kernel of 4 µs on an H200), so it is thrown away.
                    timing.measure(case, contenders[:1], exact, device, 0.01, 1)
                    warm = True
                able = [one for one in contenders if one.takes(case)]
                rows.append(
                    timing.measure(
                        case, able, exact, device, plan.seconds, plan.repetitions, ceilings
                    )
                )
            except torch.OutOfMemoryError:
                problems.append(f"{name}: the inputs do not fit on {device}")
            except timing.DeviceLostError as error:
                problems.append(f"{name}: {error}; nothing after it was measured")
                break
            torch.cuda.empty_cache()
            progress.advance(task)
    baseline = contenders[0].name
    failures = [
        f"{label_text(row.labels)}: {name}: {one.failure}"
        for row in rows
        for name, one in row.contenders.items()
        if isinstance(one, Failed)
    ]
    return Record(
        operation=plan.operation,
        dtype=plan.dtype,
        baseline=baseline,
        backends=ours,
        baselines=[one.name for one in contenders if one.name not in ours],
        skipped=skipped,
        ceilings=ceilings,
        summary=summary(rows, baseline),
        captured=captured,
        weighted=weighted(rows, baseline) if captured else {},
        failures=problems + failures,
        warnings=bench_device.clock_warnings([row.clocks for row in rows]),
        provenance=provenance(device, plan),
        rows=rows,
    )


def failed(record: Record) -> bool:
    """Whether a backend of this package, the named baseline or a whole case failed."""
    names = [
        name
        for row in record.rows
        for name, one in row.contenders.items()
        if isinstance(one, Failed)
    ]
    required = {record.baseline, *record.backends}
    return len(record.failures) > len(names) or not required.isdisjoint(names)
