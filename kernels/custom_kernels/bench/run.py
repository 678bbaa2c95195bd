# SPDX-License-Identifier: Apache-2.0
"""Measure the cases of a plan, and make the record of it."""

from dataclasses import asdict
from types import ModuleType
from typing import Any

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
from custom_kernels.bench import records, timing
from custom_kernels.bench.plan import Plan, cases_of, contenders_of, label_text
from custom_kernels.bench.provenance import provenance


def run(plan: Plan, definition: ModuleType, device: torch.device) -> records.Record:
    """Measure every case of the plan on this GPU."""
    cases = cases_of(plan, definition)
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
        limits = bench_device.ceilings(device, sorted({case.peak for case in cases}))
        exact = registry.operation(plan.operation).reference.exact
        rows: list[dict[str, Any]] = []
        problems: list[str] = []
        settled = False
        for case in cases:
            name = label_text(case.labels)
            progress.update(task, description=name)
            try:
                if not settled:
                    # The very first measurement of a process ran 8 % faster than all that
                    # followed (a kernel of 4 µs on an H200), so it is thrown away.
                    timing.measure(case, contenders[:1], exact, device, 0.01, 1)
                    settled = True
                measurement = timing.measure(
                    case, contenders, exact, device, plan.seconds, plan.repetitions
                )
            except torch.OutOfMemoryError:
                problems.append(f"{name}: the inputs do not fit on {device}")
            except timing.DeviceLostError as error:
                problems.append(f"{name}: {error}; nothing after it was measured")
                break
            else:
                rows.append(records.row(measurement, limits))
            torch.cuda.empty_cache()
            progress.advance(task)
    baseline = contenders[0].name
    failures = problems + [
        f"{label_text(row['labels'])}: {name}: {one['failure']}"
        for row in rows
        for name, one in row["contenders"].items()
        if "failure" in one
    ]
    return {
        "schema": records.SCHEMA,
        "operation": plan.operation,
        "dtype": plan.dtype,
        "baseline": baseline,
        "backends": ours,
        "baselines": [one.name for one in contenders if one.name not in ours],
        "skipped": skipped,
        "ceilings": asdict(limits),
        "summary": records.summary(rows, baseline),
        "failures": failures,
        "warnings": bench_device.clock_warnings([row["clocks"] for row in rows]),
        "provenance": provenance(device, plan),
        "rows": rows,
    }


def failed(record: records.Record) -> bool:
    """Whether something that must work did not: a backend of this package, the named baseline, a
    whole case."""
    must = {record["baseline"], *record["backends"]}
    known = [
        (name, one)
        for row in record["rows"]
        for name, one in row["contenders"].items()
        if "failure" in one
    ]
    return len(record["failures"]) > len(known) or any(name in must for name, _ in known)
