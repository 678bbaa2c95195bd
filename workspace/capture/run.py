# SPDX-License-Identifier: Apache-2.0
"""The steps of `make capture`, in the order in which they happen."""

import os
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from custom_kernels.bench.shapes import Worker
from custom_kernels.vllm.capture import ENVIRONMENT
from pydantic import ValidationError

from workspace.bench import models, processes, provenance, workload
from workspace.bench import report as bench_report
from workspace.bench.guards import disk_errors_in_one_line, only_bench, signals_stop_engine
from workspace.bench.measure import SEED
from workspace.bench.messages import Job, Stage
from workspace.bench.plan import Plan, check_memory, detect_device
from workspace.bench.record import write
from workspace.bench.runner import LOCK, LOGS, RUNS, remove_left, require_valid, slug, warn_if_busy
from workspace.bench.time_left import TimeLeft
from workspace.bench.variants import Variant, arguments, check_surroundings, environment
from workspace.capture import report
from workspace.capture.engine import Captured
from workspace.capture.record import Record, Workload
from workspace.host.errors import WorkspaceError
from workspace.host.files import remove_partial
from workspace.host.paths import RESULTS
from workspace.host.text import make_command, plural
from workspace.pins.release import to_repeat
from workspace.verbs import Bench, Capture

RECORDS = RESULTS / "capture"
"""Beside the records of benchmarks, which are compared and drawn as those of speeds."""


def run(options: Capture) -> Record:
    """Capture what `options` describe, or read what an engine wrote; the record, which is in a
    file, too.

    Raises:
        WorkspaceError: it could not be run, or a check failed; then the record says so, too.
    """
    with disk_errors_in_one_line():
        result = merge(Path(options.source)) if options.source else capture(options)
        path = RECORDS / f"{result.run}.json"
        remove_partial(RECORDS)
        write(result, path)
        report.show(result, path)
        require_valid(result.run, result.failures, path)
        return result


def merge(folder: Path) -> Record:
    """The record of what the workers of an engine wrote to `folder`.

    Raises:
        WorkspaceError: there is nothing, or it is of several engines.
    """
    workers = read(folder)
    run_id, started = named(workers[0].model)
    return Record(
        run=run_id,
        started=started,
        valid=True,
        failures=[],
        command=make_command("capture", FROM=folder),
        workers=workers,
    )


def read(folder: Path) -> list[Worker]:
    """What the workers of one engine wrote, by rank.

    Raises:
        WorkspaceError: nothing that can be read, or the workers of several engines.
    """
    workers = []
    for path in sorted(folder.glob("worker-*.json")):
        try:
            workers.append(Worker.model_validate_json(path.read_text()))
        except ValidationError as error:
            raise WorkspaceError(
                f"{path} is not what a worker of this version captures: {error.errors()[0]['msg']}"
            ) from error
    if not workers:
        raise WorkspaceError(
            f"no worker has captured anything in {folder}; start vLLM with "
            f"{ENVIRONMENT}={folder} and send it requests"
        )
    workers.sort(key=lambda worker: worker.rank)
    if len({worker.rank for worker in workers}) < len(workers):
        raise WorkspaceError(
            f"{folder} has captures of several engines; give each engine a folder of its own"
        )
    return workers


def capture(options: Capture) -> Record:
    """Run vLLM's throughput benchmark in one engine of stock: a round to warm up, and one that
    counts.

    Raises:
        WorkspaceError: it could not be run.
    """
    with only_bench(LOCK), signals_stop_engine():
        plan, expected = prepare(options)
        load_before = os.getloadavg()[0]
        warn_if_busy()
        run_id, started = named(plan.model.name)
        remove_left(RUNS)
        folder = RUNS / run_id
        result = engine(plan, expected, folder, LOGS / run_id)
        # They know the name of a folder at best.
        workers = [
            worker.model_copy(update={"model": plan.model.name})
            for worker in read(folder / "shapes")
        ]
        shutil.rmtree(folder, ignore_errors=True)
    sources, failures = provenance.collect(
        result.kernels_source_hash, result.environment, load_before
    )
    return Record(
        run=run_id,
        started=started,
        valid=not (failures := [*failures, *check(plan, result, workers)]),
        failures=failures,
        command=command(plan),
        workload=Workload.model_validate(plan, from_attributes=True),
        model=plan.model.record(result.dtype),
        round=result.rounds[0],
        provenance=sources,
        workers=workers,
    )


def prepare(options: Capture) -> tuple[Plan, Mapping[Stage, float]]:
    """Check the options, resolve the model, fit the workload and announce it.

    Returns:
        The plan, and estimated seconds of each stage; empty if unknown.
    """
    device = detect_device()
    check_surroundings()
    remove_partial(models.MODELS)
    bench_report.line("resolving the model …")
    model = models.resolve(options.model, device.kind)
    bench_report.line(f"{model.name}: {model.weights_label}, from: {model.source}")
    sizes = ("input_len", "output_len", "num_prompts", "tp", "eager")
    given = {size: getattr(options, size) for size in sizes}
    plan, expected = workload.fit(Bench(rounds=1, repeats=1, **given), device, model)
    check_memory(plan)
    bench_report.line(f"workload: {command(plan)}")
    return plan, expected


def engine(plan: Plan, expected: Mapping[Stage, float], folder: Path, logs: Path) -> Captured:
    """Run the engine; its workers write to `folder`/shapes.

    Raises:
        WorkspaceError: it failed; why, and where its log is.
    """
    stock = Variant("stock")
    job = Job(
        metric=plan.metric,
        arguments=arguments(plan, stock),
        rounds=1,
        seed=SEED,
        prompts=list[str](),
        new_tokens=0,
        top=0,
        launches=folder / "launches",
        folder=folder / stock.name,
    )
    settings = environment(plan, stock, job.launches) | {ENVIRONMENT: str(folder / "shapes")}
    with bench_report.progress([stock.name], TimeLeft(expected, 1, [stock.name])) as progress:
        progress.start()
        result = processes.run_program(
            "workspace.capture.engine", Captured, job, settings, logs / "stock.log",
            progress.step, stock.name,
        )  # fmt: skip
        progress.end(1)
    return result


def check(plan: Plan, result: Captured, workers: list[Worker]) -> list[str]:
    """Every worker counted every token of the round: a prompt's, and each new one but the last."""
    failures: list[str] = []
    if len(workers) != plan.tensor_parallel:
        failures.append(
            f"{plural(len(workers), 'worker')} captured shapes, {plan.tensor_parallel} expected"
        )
    done = result.rounds[0]
    ran = done.prompt_tokens + done.output_tokens - plan.num_prompts
    failures += [
        f"rank {worker.rank} captured {worker.scheduled} tokens of the {ran} that ran"
        for worker in workers
        if worker.scheduled < ran
    ]
    return failures


def command(plan: Plan) -> str:
    """The `make` command that captures the same, every default written out."""
    return make_command(
        "capture",
        MODEL=plan.model.requested_path or plan.model.name,
        INPUT_LEN=plan.input_len,
        OUTPUT_LEN=plan.output_len,
        NUM_PROMPTS=plan.num_prompts,
        TP=plan.tensor_parallel,
        EAGER=int(plan.eager),
        VLLM_VERSION=to_repeat(),
    )


def named(model: str) -> tuple[str, str]:
    """Name of a run that begins now, and the time."""
    now = datetime.now(UTC)
    return f"capture-{now:%Y%m%d-%H%M%S}-{slug(model)}", now.isoformat(timespec="seconds")
