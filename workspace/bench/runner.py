# SPDX-License-Identifier: Apache-2.0
"""The steps of `make bench`, in the order in which they happen."""

import errno
import fcntl
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import FrameType

import psutil

from workspace.bench import (
    chart,
    checks,
    layers,
    models,
    pristine,
    processes,
    prompts,
    provenance,
    record,
    report,
    workload,
)
from workspace.bench.compare import compare
from workspace.bench.engine_run import Job, Result, Stage
from workspace.bench.plan import (
    BenchOptions,
    Plan,
    check_backend,
    check_memory,
    check_quantization,
    detect_device,
    repeat_command,
)
from workspace.bench.time_left import TimeLeft
from workspace.bench.variants import (
    Variant,
    arguments,
    check_surroundings,
    command_line,
    common_settings,
    environment,
    stock_and_custom,
)
from workspace.host.errors import WorkspaceError
from workspace.host.files import remove_partial
from workspace.host.paths import RESULTS, STATE
from workspace.pins.release import tree

LOCK = STATE / "bench.lock"
RUNS = STATE / "bench"
LOGS = STATE / "logs"

SEED = 1
"""Seed of the first warm-up; round k uses SEED + k in every process of both variants."""
BUSY = 0.2
"""Share of the processors that others may use before it is worth a word."""


@dataclass(frozen=True)
class Ran:
    """One finished process."""

    order: int
    pair: int
    variant: Variant
    result: Result


def run(options: BenchOptions) -> None:
    """Run the benchmark that `options` describe.

    Raises:
        WorkspaceError: it could not be run, or a proof failed; a failed proof leaves a record
            that says so.
    """
    with _only_bench(), _signals_end_children(), _disk_errors_in_one_line():
        device = detect_device()
        check_backend(options.backend, device)
        check_quantization(options.quantization)
        check_surroundings()
        remove_partial(models.MODELS)
        report.say("resolving the model …")
        model = models.resolve(options.model, device.kind)
        report.say(f"{model.name}: {model.weights_label}, from: {model.source}")
        made, expected = workload.fit(options, device, model)
        check_memory(made)
        report.announce(made, options, workload.total(made, expected))

        started, load = datetime.now(UTC), os.getloadavg()[0]
        busy = psutil.cpu_percent(interval=0.5) / 100
        if busy > BUSY:
            others = f"others use {busy:.0%} of this machine"
            report.say(f"{others}: expect scattered figures and a longer run")
        run_id = f"{started:%Y%m%d-%H%M%S}-{_slug(made.model.name)}-{made.metric}"
        sides = pristine.sides(made) if made.baseline == "pristine" else stock_and_custom(made)
        limited = made.device.kind == "cpu" and options.rounds is None
        limit = workload.LIMIT_SECONDS if limited else None
        made, done = _run_all(made, sides, run_id, expected, limit)

        result = _make_record(made, sides, done, run_id, started, load)
        path, picture = RESULTS / f"{run_id}.json", RESULTS / f"{run_id}.png"
        remove_partial(RESULTS)
        record.write(result, path)
        chart.draw(result, picture)
        shutil.rmtree(RUNS / run_id, ignore_errors=True)
        report.show(result, path, picture)
        if not result.valid:
            more = f" (and {len(result.failures) - 1} more)" if len(result.failures) > 1 else ""
            raise WorkspaceError(
                f"the run is not valid: {result.failures[0]}{more}; "
                f"logs: {report.shown(LOGS / run_id)}, record: {report.shown(path)}"
            )


def _run_all(
    plan: Plan,
    sides: tuple[Variant, Variant],
    run_id: str,
    expected: Mapping[Stage, float],
    limit: float | None,
) -> tuple[Plan, list[Ran]]:
    """Every process, one after the other, in the order A B, B A, A B, …

    Turning each pair around cancels a drift of the machine (heat, another load) to first order.

    Args:
        expected: seconds of each stage of a process, as far as they can be told.
        limit: seconds for all processes. Where they do not suffice, fewer rounds are measured, in
            all processes the same ones, but never fewer than a verdict needs.

    Returns:
        The plan with as many rounds as were measured, and the processes.
    """
    end = None if limit is None else time.monotonic() + limit
    for left in RUNS.glob("*"):  # by a run that was killed; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    order = [
        (pair, side)
        for pair in range(plan.repeats)
        for side in (sides if pair % 2 == 0 else sides[::-1])
    ]
    done: list[Ran] = []
    names = [variant.name for _, variant in order]
    with report.progress(names, TimeLeft(expected, plan.rounds, names)) as progress:
        for number, (pair, variant) in enumerate(order, 1):
            name = f"{number}-{variant.name}"
            folder = RUNS / run_id / name
            seconds = None
            if end is not None:
                share = (end - time.monotonic()) / (len(order) - len(done))
                seconds = share - progress.clock.of_stage(variant.name, "comparing outputs")
            job = Job(
                metric=plan.metric,
                arguments=arguments(plan, variant),
                rounds=plan.rounds,
                fewest_rounds=workload.fewest_rounds(plan),
                seconds=seconds,
                seed=SEED,
                prompts=prompts.prompts(plan, SEED),
                new_tokens=prompts.new_tokens(plan),
                top=prompts.TOP,
                launches=folder / "launches",
                folder=folder,
            )
            progress.start()
            result = processes.run(
                job,
                environment(plan, variant, job.launches),
                LOGS / run_id / f"{name}.log",
                progress.step,
                variant.name,
            )
            plan = replace(plan, rounds=min(plan.rounds, len(result.rounds)))
            progress.end(plan.rounds)
            if variant.launches and plan.layers:
                _stop_if_no_layer_matches(plan.layers, result)
            done.append(Ran(number, pair, variant, result))
    # Round k ran the same prompts in every process: what is compared are the rounds that all have.
    for ran in done:
        del ran.result.rounds[plan.rounds :]
    return plan, done


def _stop_if_no_layer_matches(patterns: str, result: Result) -> None:
    for pattern in checks.split_patterns(patterns):
        names = {name for counted in result.layers.values() for name in counted}
        if not checks.matching(pattern, names):
            raise WorkspaceError(
                f"LAYERS: {pattern!r} matches none of the model's {len(names)} linear layers; "
                f"there are, for example, {', '.join(layers.one_of_each(names))}"
            )


def _make_record(
    plan: Plan,
    sides: tuple[Variant, Variant],
    done: list[Ran],
    run_id: str,
    started: datetime,
    load: float,
) -> record.Record:
    """Check every proof and put everything down."""
    baseline, candidate = ([ran for ran in done if ran.variant is side] for side in sides)
    failures = checks.same_versions([ran.result for ran in done])
    failures += checks.same_files([ran.result for ran in done])
    failures += checks.same_kernels([ran.result for ran in done if ran.variant.launches])
    modules = frozenset(name for ran in done for name in ran.result.modules)
    expected = provenance.expected(plan.device.kind, modules)
    for ran in done:
        where = f"{ran.variant.name} (process {ran.order})"
        failures += checks.tokens(plan, where, ran.result)
        failures += checks.launches(plan, where, ran.result, ran.variant.launches)
        if ran.variant.launches and (plan.layers or plan.quantization):
            failures += checks.layers(plan.layers or "*", where, ran.result)
        failures += checks.imports(where, ran.result, ran.variant.python_path or tree(), expected)
    for old, new in zip(baseline, candidate, strict=True):
        failures += checks.same_prompts(old.result, new.result)

    first = done[0].result
    tolerance = checks.TOLERANCES.get(first.dtype, checks.TOLERANCES["bfloat16"])

    def agreement(one: Ran, other: Ran) -> checks.Agreement:
        outputs = one.result.generations, other.result.generations
        return checks.agreement(*outputs, tolerance, plan.model.vocab_size)

    if plan.quantization:
        agreements = [
            checks.distance(
                baseline[0].result.generations, ran.result.generations, plan.model.vocab_size
            )
            for ran in candidate
        ]
    else:
        agreements = [agreement(baseline[0], ran) for ran in candidate]
    worst = max(agreements, key=lambda a: (len(a.failures), a.largest))
    failures += worst.failures
    with_itself = agreement(baseline[0], baseline[1]) if len(baseline) > 1 else None
    repeated = None
    if plan.quantization and len(candidate) > 1:
        repeated = agreement(candidate[0], candidate[1])
        failures += [f"{sides[1].name} against itself: {one}" for one in repeated.failures]

    sources, unknown = provenance.collect(
        candidate[0].result.kernels_source_hash, first.environment, load
    )
    failures += unknown

    gpu = first.environment.get("device")
    cpu = plan.device.kind == "cpu"
    return record.Record(
        run=run_id,
        started=started.isoformat(timespec="seconds"),
        duration_s=round((datetime.now(UTC) - started).total_seconds(), 1),
        valid=not failures,
        failures=failures,
        command=repeat_command(plan),
        settings=_settings(plan),
        model=record.ModelRecord(
            name=plan.model.name,
            weights=plan.model.weights,
            seed=plan.model.seed,
            source=plan.model.source,
            dtype=first.dtype,
            parameters=models.parameters(plan.model.config),
        ),
        device=plan.device.name if cpu else f"{plan.tp} x {gpu}",
        device_kind=plan.device.kind,
        note="; ".join(_notes(plan)),
        unit="tokens/s" if plan.metric == "throughput" else "s",
        variants=[
            _variant(plan, sides[0], baseline),
            _variant(plan, sides[1], candidate),
        ],
        comparison=compare(
            [_figures(plan, ran.result) for ran in baseline],
            [_figures(plan, ran.result) for ran in candidate],
            higher_is_better=plan.metric == "throughput",
        ),
        agreement=worst,
        baseline_with_itself=with_itself,
        candidate_with_itself=repeated,
        provenance=sources,
    )


def _notes(plan: Plan) -> list[str]:
    notes = ["CPU: only the ratio means something"] if plan.device.kind == "cpu" else []
    if plan.quantization:
        notes.append(f"custom is quantized ({plan.quantization}) and computes something else")
    return notes


def _settings(plan: Plan) -> record.Settings:
    tokens_in, tokens_out = plan.tokens
    return record.Settings(
        metric=plan.metric,
        input_len=plan.input_len,
        output_len=plan.output_len,
        num_prompts=plan.num_prompts,
        backend=plan.backend,
        layers=plan.layers,
        quantization=plan.quantization,
        repeats=plan.repeats,
        rounds=plan.rounds,
        tensor_parallel=plan.tp,
        eager=plan.eager,
        input_tokens_per_round=tokens_in,
        output_tokens_per_round=tokens_out,
    )


def _variant(plan: Plan, variant: Variant, ran: list[Ran]) -> record.VariantRecord:
    figures = [value for one in ran for value in _figures(plan, one.result)]
    launches: dict[str, int] = {}
    for one in ran:
        for name, count in checks.sum_launches(one.result).items():
            launches[name] = launches.get(name, 0) + count
    return record.VariantRecord(
        name=variant.name,
        environment=common_settings(plan) | variant.switches,
        command=command_line(plan, variant),
        processes=[
            record.ProcessRecord(
                order=one.order,
                pair=one.pair + 1,
                vllm_folder=report.shown(Path(one.result.vllm_folder)),
                engine_start_s=one.result.engine_start_s,
                warm_up=one.result.warm_up,
                rounds=one.result.rounds,
                figures=_figures(plan, one.result),
                launches=one.result.launches,
                layers=one.result.layers,
            )
            for one in ran
        ],
        median=median(figures),
        lowest=min(figures),
        highest=max(figures),
        launches=launches,
    )


def _figures(plan: Plan, result: Result) -> list[float]:
    """Tokens per second (input and output together), or seconds per batch, of every round."""
    if plan.metric == "latency":
        return [done.elapsed_s for done in result.rounds]
    return [(done.prompt_tokens + done.output_tokens) / done.elapsed_s for done in result.rounds]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.").lower()


@contextmanager
def _only_bench() -> Iterator[None]:
    """Hold the bench lock; the system gives it back however this process ends.

    Raises:
        WorkspaceError: another bench is running; the two would disturb each other's figures.
    """
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with LOCK.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise WorkspaceError(
                f"another bench is running in this checkout (process {holder}) and two would "
                "disturb each other's figures; run this one when it is done"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def _disk_errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise WorkspaceError(
            f"cannot write {error.filename or STATE}: {error.strerror}; "
            "free some space or make the folder writable, run again"
        ) from error


@contextmanager
def _signals_end_children() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into an orderly end; `processes.run` ends the engine."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if ours else None
    try:
        yield
    except KeyboardInterrupt:
        raise WorkspaceError(
            "interrupted; the engine was stopped and nothing was recorded"
        ) from None
    finally:
        if ours:
            with suppress(TypeError):
                signal.signal(signal.SIGTERM, before)
