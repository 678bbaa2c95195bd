# SPDX-License-Identifier: Apache-2.0
"""Make the record from the results of the processes: check, compare, collect provenance."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from workspace.bench import checks, operations, provenance, serving
from workspace.bench.compare import compare
from workspace.bench.measure import ProcessRun
from workspace.bench.messages import Result
from workspace.bench.plan import Plan, repeat_command
from workspace.bench.record import (
    CPU_NOTE,
    Agreement,
    Figure,
    Metric,
    ProcessRecord,
    Record,
    Settings,
    Unit,
    VariantRecord,
    higher_is_better,
)
from workspace.bench.variants import Variant, command_line, common_settings
from workspace.fork.tree_state import shown
from workspace.pins.release import tree

UNITS: dict[Metric, Unit] = {"throughput": "tokens/s", "latency": "s"}
"""METRIC=serve has several figures."""


def evaluate(
    plan: Plan,
    variants: tuple[Variant, Variant],
    runs: Sequence[ProcessRun],
    run_id: str,
    started: datetime,
    load: float,
) -> Record:
    """The record of a run; a failed check makes it invalid.

    Args:
        variants: baseline and candidate.
        runs: all processes, in the order in which they ran.
        load: the machine's load average before the run.
    """
    baseline, candidate = (
        [run.result for run in runs if run.variant is variant] for variant in variants
    )
    failures = _failures(plan, runs)
    for old, new in zip(baseline, candidate, strict=True):
        failures += checks.same_prompts(old, new)
    agreement, baseline_with_itself, candidate_with_itself = _agreements(plan, baseline, candidate)
    failures += agreement.failures
    if candidate_with_itself is not None and not checks.steady(
        candidate_with_itself, baseline_with_itself
    ):
        name = variants[1].name
        failures += [f"{name} against itself: {one}" for one in candidate_with_itself.failures]
    first = runs[0].result
    sources, errors = provenance.collect(candidate[0].kernels_source_hash, first.environment, load)
    failures += errors
    unit = _unit(plan)
    on_cpu, gpu = plan.device.kind == "cpu", first.environment.get("device")
    return Record(
        run=run_id,
        started=started.isoformat(timespec="seconds"),
        duration_s=round((datetime.now(UTC) - started).total_seconds(), 1),
        valid=not failures,
        failures=failures,
        command=repeat_command(plan),
        settings=Settings.model_validate(plan, from_attributes=True),
        model=plan.model.record(first.dtype),
        device=plan.device.name if on_cpu else f"{plan.workers} x {gpu}",
        device_kind=plan.device.kind,
        note="; ".join(_notes(plan)),
        unit=unit,
        figure=_kinds(plan)[0].name if plan.metric == "serve" else None,
        variants=[variant_record(plan, variant, runs) for variant in variants],
        comparison=compare(
            [_figures(plan, result) for result in baseline],
            [_figures(plan, result) for result in candidate],
            higher_is_better=higher_is_better(unit),
        ),
        figures=_others(plan, baseline, candidate),
        agreement=agreement,
        baseline_with_itself=baseline_with_itself,
        candidate_with_itself=candidate_with_itself,
        provenance=sources,
    )


def _failures(plan: Plan, runs: Sequence[ProcessRun]) -> list[str]:
    """Failures of all checks but those of the outputs."""
    results = [run.result for run in runs]
    failures = checks.unchanged(results, [run.result for run in runs if run.variant.launches])
    modules = frozenset(name for result in results for name in result.modules)
    expected = provenance.expected(plan.device.kind, modules)
    for run in runs:
        name, result = f"{run.variant.name} (process {run.order})", run.result
        failures += checks.tokens(plan, name, result)
        failures += checks.launches(plan, name, result, run.variant.launches)
        if run.variant.launches and plan.counts_layers:
            failures += checks.layers(plan.layers or "*", name, result)
        failures += checks.imports(name, result, run.variant.python_path or tree(), expected)
    return failures


def _agreements(
    plan: Plan, baseline: Sequence[Result], candidate: Sequence[Result]
) -> tuple[Agreement, Agreement | None, Agreement | None]:
    """The worst of candidate against baseline; the baseline against itself, and the candidate
    against itself where it computes something else, if they ran twice."""
    tolerance = checks.tolerance(plan, baseline[0].dtype)
    vocab_size, reference = plan.model.config.vocab_size, baseline[0].generations

    def itself(results: Sequence[Result]) -> Agreement | None:
        if len(results) < 2:
            return None
        first, second = (result.generations for result in results[:2])
        return checks.agreement(first, second, tolerance, vocab_size)

    agreements = [
        checks.distance(reference, result.generations, vocab_size)
        if plan.lossy
        else checks.agreement(reference, result.generations, tolerance, vocab_size)
        for result in candidate
    ]
    worst = max(agreements, key=lambda a: (len(a.failures), a.largest))
    return worst, itself(baseline), itself(candidate) if plan.lossy else None


def _notes(plan: Plan) -> list[str]:
    notes = [CPU_NOTE] if plan.device.kind == "cpu" else []
    if plan.interpret:
        notes = ["custom runs in Triton's interpreter: the outputs count, the speed does not"]
    opaque = [name for name in plan.operations if name != operations.GEMM]
    if plan.baseline == "self":
        return [*notes, "stock against itself: whatever differs is noise"]
    if opaque and not (plan.eager or plan.method or plan.baseline == "pristine"):
        notes.append(
            f"torch.compile merges stock's {', '.join(opaque)} with what is around them; custom "
            "runs kernels of their own"
        )
    if plan.same_weights:
        inexact = ", and multiplies them inexactly: this CPU has no VNNI" if plan.inexact else ""
        return [*notes, f"{plan.baseline} loads the same weights as dense ones{inexact}"]
    sparse = plan.model.quantized.label if plan.model.quantized else None
    methods = {
        "fp8": "fp8" if plan.baseline == "fp8" else None,
        "custom": plan.quantization or sparse if plan.method else None,
    }
    notes += [
        f"{variant} is quantized ({method}) and computes something else"
        for variant, method in methods.items()
        if method
    ]
    return notes


def variant_record(plan: Plan, variant: Variant, runs: Sequence[ProcessRun]) -> VariantRecord:
    """The part of the record about one variant, from its processes among `runs`."""
    runs = [run for run in runs if run.variant is variant]
    launches = sum((run.result.total_launches() for run in runs), Counter[str]())
    processes = [
        ProcessRecord(
            order=run.order,
            pair=run.pair + 1,
            vllm_folder=shown(Path(run.result.vllm_folder)),
            engine_start_s=run.result.engine_start_s,
            warm_up=run.result.warm_up,
            rounds=run.result.rounds,
            figures=_figures(plan, run.result),
            launches=run.result.launches,
            layers=run.result.layers,
            tokens=run.result.tokens,
            attention=run.result.attention,
        )
        for run in runs
    ]
    figures = [figure for process in processes for figure in process.figures]
    return VariantRecord(
        name=variant.name,
        environment=common_settings(plan) | variant.switches,
        command=command_line(plan, variant),
        processes=processes,
        median=median(figures),
        lowest=min(figures),
        highest=max(figures),
        launches=launches,
    )


def _unit(plan: Plan) -> Unit:
    return UNITS.get(plan.metric) or _kinds(plan)[0].unit


def _kinds(plan: Plan) -> list[serving.Kind]:
    return serving.kinds(plan.output_len, plan.request_rate, plan.goodput)


def _others(plan: Plan, baseline: Sequence[Result], candidate: Sequence[Result]) -> list[Figure]:
    """The figures of METRIC=serve beside the one with the verdict."""
    found = []
    for kind in _kinds(plan)[1:] if plan.metric == "serve" else ():
        old, new = (
            [serving.figures(kind, result.rounds) for result in results]
            for results in (baseline, candidate)
        )
        flat = [[value for rounds in side for value in rounds] for side in (old, new)]
        positive = all(value > 0 for values in flat for value in values)
        comparison = compare(old, new, higher_is_better(kind.unit)) if positive else None
        found.append(
            Figure(
                name=kind.name,
                unit=kind.unit,
                medians=[median(values) for values in flat],
                comparison=comparison,
            )
        )
    return found


def _figures(plan: Plan, result: Result) -> list[float]:
    """Tokens per second (input and output together), seconds per batch, or the first figure of
    METRIC=serve, of every round."""
    if plan.metric == "serve":
        return serving.figures(_kinds(plan)[0], result.rounds)
    if plan.metric == "latency":
        return [done.elapsed_s for done in result.rounds]
    return [(done.prompt_tokens + done.output_tokens) / done.elapsed_s for done in result.rounds]
