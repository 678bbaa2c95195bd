# SPDX-License-Identifier: Apache-2.0
"""The steps of `make bench`, in the order in which they happen."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from workspace.bench import chart, models, noise, operations, pristine, record, report, workload
from workspace.bench.compare import of_record
from workspace.bench.evaluate import evaluate
from workspace.bench.guards import disk_errors_in_one_line, only_bench, signals_stop_engine
from workspace.bench.measure import measure
from workspace.bench.messages import Stage
from workspace.bench.plan import (
    Plan,
    check_memory,
    check_quantization,
    detect_device,
)
from workspace.bench.record import Record
from workspace.bench.variants import check_surroundings, stock_and_custom, stock_and_itself
from workspace.fork.tree_state import shown
from workspace.host.errors import WorkspaceError
from workspace.host.files import remove_partial
from workspace.host.paths import RESULTS, STATE
from workspace.verbs import Bench

LOCK = STATE / "bench.lock"
RUNS = STATE / "bench"
LOGS = STATE / "logs"

BUSY = 0.2
"""The user is warned if other processes use more than this share of the processors."""


def run(options: Bench) -> Record:
    """Run the benchmark that `options` describe; its record, which is in a file, too.

    Raises:
        WorkspaceError: it could not be run, or a check failed; then the record says so, too.
    """
    with only_bench(LOCK), signals_stop_engine(), disk_errors_in_one_line():
        plan, expected = prepare(options)
        started, load = datetime.now(UTC), os.getloadavg()[0]
        warn_if_busy()
        run_id = f"{started:%Y%m%d-%H%M%S}-{slug(plan.model.name)}-{plan.metric}"
        choose = {"pristine": pristine.variants, "self": stock_and_itself}
        variants = choose.get(plan.baseline, stock_and_custom)(plan)
        if plan.engine == "released":
            variants = pristine.released(variants)
        remove_left(RUNS)
        limited = plan.device.kind == "cpu" and options.rounds is None
        plan, processes = measure(
            plan,
            variants,
            expected,
            folder=RUNS / run_id,
            logs=LOGS / run_id,
            limit=workload.LIMIT_SECONDS if limited else None,
        )
        result = evaluate(plan, variants, processes, run_id, started, load)
        if plan.baseline != "self":
            measured = noise.of_runs(noise.runs(RESULTS, result))
            result.comparison = of_record(result, measured)
        path, plot = save(result)
        shutil.rmtree(RUNS / run_id, ignore_errors=True)
        report.show(result, path, plot)
        require_valid(result.run, result.failures, path)
        return result


def remove_left(runs: Path) -> None:
    """Remove what a run that was killed left; whoever holds the lock calls it, so no other runs."""
    for folder in runs.glob("*"):
        shutil.rmtree(folder, ignore_errors=True)


def prepare(options: Bench) -> tuple[Plan, Mapping[Stage, float]]:
    """Check the options, resolve the model, fit the workload and announce it.

    Returns:
        The plan, and estimated seconds of each stage of a process; empty if unknown.
    """
    device = detect_device()
    chosen = operations.chosen(options.op, options.backend)
    operations.check(chosen, device.kind)
    if options.way == "ir":
        operations.ir_arguments(chosen)  # or it says why not
    check_quantization(options.quantization)
    check_surroundings()
    remove_partial(models.MODELS)
    report.line("resolving the model …")
    model = models.resolve(options.model, device.kind)
    report.line(f"{model.name}: {model.weights_label}, from: {model.source}")
    sparse = model.pattern or (model.quantized and options.quantization)
    if sparse and options.baseline in ("stock", "bf16"):
        model = replace(model, converted_from=models.original(model, device.kind))
    plan, expected = workload.fit(options, device, model)
    check_memory(plan)
    report.announce(plan, options, workload.total(plan, expected))
    return plan, expected


def warn_if_busy() -> None:
    busy = psutil.cpu_percent(interval=0.5) / 100
    if busy > BUSY:
        report.line(
            f"other processes use {busy:.0%} of this machine: figures will scatter and the run "
            "take longer"
        )


def save(result: Record) -> tuple[Path, Path]:
    """Write the record and its plot; their paths."""
    path = RESULTS / f"{result.run}.json"
    remove_partial(RESULTS)
    record.write(result, path)
    plot = path.with_suffix(".png")
    chart.draw(result, plot)
    return path, plot


def require_valid(run: str, failures: Sequence[str], path: Path) -> None:
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise WorkspaceError(
            f"the run is not valid: {failures[0]}{more}; "
            f"logs: {shown(LOGS / run)}, record: {shown(path)}"
        )


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.").lower()
