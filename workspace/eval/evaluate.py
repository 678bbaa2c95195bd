# SPDX-License-Identifier: Apache-2.0
"""Make the record from what both processes scored: check, compare, collect provenance."""

import math
from datetime import UTC, datetime

from workspace.bench import checks, provenance
from workspace.bench.variants import common_settings, engine_arguments
from workspace.eval import quality
from workspace.eval.messages import Scores
from workspace.eval.plan import Evaluation, Side
from workspace.eval.record import RatioRecord, Record, SideRecord, TextRecord
from workspace.host.paths import ROOT
from workspace.pins.release import tree


def evaluate(
    evaluation: Evaluation,
    against: Scores,
    model: Scores,
    run_id: str,
    started: datetime,
    load: float,
) -> Record:
    """The record of a run; a failed check makes it invalid.

    Args:
        load: the machine's load average before the run.
    """
    sides = ((evaluation.against, against), (evaluation.model, model))
    failures = checks.unchanged(
        [scores for _, scores in sides], [scores for side, scores in sides if side.variant.launches]
    )
    modules = frozenset(against.modules) | frozenset(model.modules)
    device = evaluation.model.plan.device
    expected = provenance.expected(device.kind, modules)
    for side, scores in sides:
        failures += _failures(side, scores)
        failures += checks.imports(side.name, scores, tree(), expected)
    ratio = quality.ratio(against.logprobs, model.logprobs)
    note = ""
    if evaluation.same_weights and evaluation.model.plan.inexact:
        note = "vLLM's own products of int8 are not exact: this CPU has no VNNI"
    elif evaluation.same_weights:
        allowed = checks.TOLERANCES.get(model.dtype, checks.TOLERANCES["bfloat16"]).mean
        mean = quality.mean_difference(against.logprobs, model.logprobs)
        if not mean <= allowed:
            failures.append(
                f"the same weights, sparse and dense, differ by {mean:.3g} in the log-probability "
                f"of a token on average; allowed are {allowed:g}"
            )
    sources, errors = provenance.collect(model.kernels_source_hash, model.environment, load)
    failures += errors
    tensor_parallel = evaluation.model.plan.tensor_parallel
    gpu = model.environment.get("device")
    return Record(
        run=run_id,
        started=started.isoformat(timespec="seconds"),
        duration_s=round((datetime.now(UTC) - started).total_seconds(), 1),
        valid=not failures,
        failures=failures,
        command=evaluation.command,
        text=TextRecord(
            name=evaluation.text.name,
            sha256=evaluation.text.sha256,
            tokens=evaluation.tokens,
            windows=len(evaluation.windows),
            window=evaluation.window,
        ),
        device=device.name if device.kind == "cpu" else f"{tensor_parallel} x {gpu}",
        device_kind=device.kind,
        tensor_parallel=tensor_parallel,
        note=note,
        against=_side(*sides[0]),
        model=_side(*sides[1]),
        comparison=RatioRecord(ratio=ratio.value, interval=(ratio.low, ratio.high)),
        provenance=sources,
    )


def _failures(side: Side, scores: Scores) -> list[str]:
    """The kernels of the side ran in all of its layers, or none of ours did, and every token has a
    finite log-probability."""
    failures = checks.launches(side.plan, side.name, scores, side.variant.launches)
    if side.variant.launches:
        failures += checks.layers("*", side.name, scores)
    if not all(math.isfinite(value) for window in scores.logprobs for value in window):
        failures.append(f"{side.name}: the log-probability of a token is not finite")
    return failures


def _side(side: Side, scores: Scores) -> SideRecord:
    model = side.model
    arguments = engine_arguments(side.plan, side.variant)
    return SideRecord(
        name=side.name,
        model=model.record(scores.dtype),
        quantized=side.quantized,
        environment=common_settings(side.plan),
        # A record may be published: without the checkout's absolute path.
        arguments=[argument.removeprefix(f"{ROOT}/") for argument in arguments],
        perplexity=quality.perplexity(scores.logprobs),
        nats=quality.nats(scores.logprobs),
        launches=scores.launches,
        layers=scores.layers,
    )
