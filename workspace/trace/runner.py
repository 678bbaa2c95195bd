# SPDX-License-Identifier: Apache-2.0
"""The steps of `make trace`, in the order in which they happen."""

import os
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from workspace.bench import models, operations, pristine, processes
from workspace.bench import report as bench_report
from workspace.bench.guards import disk_errors_in_one_line, only_bench, signals_stop_engine
from workspace.bench.messages import WORKER_EXTENSION
from workspace.bench.plan import (
    Device,
    Plan,
    Sizes,
    check_memory,
    check_quantization,
    detect_device,
    make_plan,
)
from workspace.bench.record import DeviceKind, write
from workspace.bench.runner import LOCK, LOGS, RUNS, remove_left, require_valid, slug
from workspace.bench.time_left import TimeLeft
from workspace.bench.variants import (
    Variant,
    baseline,
    check_surroundings,
    custom,
    engine_arguments,
    environment,
)
from workspace.host.errors import WorkspaceError
from workspace.host.files import remove_partial
from workspace.host.paths import RESULTS
from workspace.trace import picture, report
from workspace.trace.evaluate import evaluate
from workspace.trace.messages import STAGES, Traced, TraceJob
from workspace.trace.record import Record
from workspace.verbs import Bench, Trace

RECORDS = RESULTS / "trace"
"""Beside the records of benchmarks, which are compared and drawn as those of speeds."""
SIZES: dict[DeviceKind, Sizes] = {"cpu": Sizes(32, 8, 4, 1), "cuda": Sizes(512, 16, 8, 1)}
"""A step of prompts, and a few in which they are continued."""


def run(options: Trace) -> Record:
    """Trace what `options` describe; its record, which is in a file, too.

    Raises:
        WorkspaceError: it could not be run, or a check failed; then the record says so, too.
    """
    with only_bench(LOCK), signals_stop_engine(), disk_errors_in_one_line():
        plan = prepare(options, detect_device())
        variants = sides(options, plan)
        report.announce(plan, variants)
        started, load = datetime.now(UTC), os.getloadavg()[0]
        run_id = f"{started:%Y%m%d-%H%M%S}-{slug(plan.model.name)}-trace"
        remove_left(RUNS)
        traced = trace(plan, variants, RUNS / run_id, LOGS / run_id)
        remove_partial(RECORDS)
        path = RECORDS / f"{run_id}.json"
        made = evaluate(
            options, plan, list(zip(variants, traced, strict=True)), path, started, load
        )
        write(made, path)
        plot = path.with_suffix(".png")
        picture.draw(made, plot)
        shutil.rmtree(RUNS / run_id, ignore_errors=True)
        report.show(made, path, plot)
        require_valid(made.run, made.failures, path)
        return made


def prepare(options: Trace, device: Device) -> Plan:
    """The plan of a benchmark that is traced instead.

    Raises:
        WorkspaceError: it cannot be traced, or not run at all.
    """
    operations.check(operations.chosen(options.op, options.backend), device.kind)
    check_quantization(options.quantization)
    check_surroundings()
    remove_partial(models.MODELS)
    bench_report.line("resolving the model …")
    model = models.resolve(options.model, device.kind)
    plan = make_plan(Bench(metric="latency", **asdict(options)), device, model, SIZES[device.kind])
    if device.kind == "cpu" and not plan.eager:
        raise WorkspaceError(
            "EAGER=0: what torch.compile makes for a CPU does not say in a trace which op it is "
            "at; use EAGER=1"
        )
    check_memory(plan)
    return plan


def sides(options: Trace, plan: Plan) -> list[Variant]:
    """Stock alone, or with the custom variant if an option asks for something of ours."""
    both = options.op or options.backend or options.layers or plan.method
    variants = (baseline(plan), custom(plan))
    if plan.engine == "released":
        variants = pristine.released(variants)
    return list(variants if both else variants[:1])


def trace(plan: Plan, variants: list[Variant], folder: Path, logs: Path) -> list[Traced]:
    """What a process of each variant ran, one after the other; their traces are in `folder`."""
    names = [variant.name for variant in variants]
    done: list[Traced] = []
    with bench_report.progress(names, TimeLeft({}, 1, names, STAGES)) as progress:
        for variant in variants:
            arguments = engine_arguments(plan, variant)
            if WORKER_EXTENSION not in arguments:
                arguments += [WORKER_EXTENSION, "workspace.bench.worker.WorkerExtension"]
            job = TraceJob(
                arguments=arguments,
                launches=folder / variant.name / "launches",
                folder=folder / variant.name,
                requests=plan.num_prompts,
                input_len=plan.input_len,
                output_len=plan.output_len,
                eager=plan.eager,
                traces=folder / variant.name / "traces",
                dtypes=_dtypes(plan),
            )
            progress.start()
            traced = processes.run_program(
                "workspace.trace.engine",
                Traced,
                job,
                environment(plan, variant, job.launches),
                logs / f"{variant.name}.log",
                progress.step,
                variant.name,
            )
            progress.end(1)
            done.append(traced)
    return done


def _dtypes(plan: Plan) -> list[str]:
    """Of the products whose rate on the GPU the linear layers are measured by."""
    if plan.device.kind == "cpu":
        return []
    narrow = plan.method or plan.model.quantized or plan.baseline in ("fp8", "int8")
    return ["bfloat16", "float8_e4m3fn"] if narrow else ["bfloat16"]
