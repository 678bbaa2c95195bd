# SPDX-License-Identifier: Apache-2.0
"""Run every process of a benchmark, one after the other, in the order A B, B A, A B, …

Swapping the variants in every second pair cancels a drift of the machine (heat, another load) to
first order.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.bench import checks, layers, processes, prompts, report, workload
from workspace.bench.messages import Job, Result, Stage
from workspace.bench.plan import Plan
from workspace.bench.time_left import TimeLeft
from workspace.bench.variants import Variant, arguments, environment, server_arguments
from workspace.host.errors import WorkspaceError

SEED = 1
"""Seed of the first warm-up; round k uses SEED + k in every process of both variants."""


@dataclass(frozen=True)
class ProcessRun:
    """One finished process; `order` counts from 1, `pair` from 0."""

    order: int
    pair: int
    variant: Variant
    result: Result


def measure(
    plan: Plan,
    variants: tuple[Variant, ...],
    expected: Mapping[Stage, float],
    *,
    folder: Path,
    logs: Path,
    limit: float | None,
) -> tuple[Plan, list[ProcessRun]]:
    """Run the processes of the variants.

    Args:
        expected: estimated seconds of each stage of a process; may be empty.
        folder: for the messages of the processes.
        logs: for a log of each process.
        limit: seconds for all processes. If they are too few, every process measures fewer rounds,
            the same number each, but never fewer than a verdict needs.

    Returns:
        The plan with the number of rounds that were measured, and the processes.

    Raises:
        WorkspaceError: a process failed, or LAYERS matches no layer.
    """
    end = None if limit is None else time.monotonic() + limit
    order = [
        (pair, variant)
        for pair in range(plan.repeats)
        for variant in (variants if pair % 2 == 0 else variants[::-1])
    ]
    done: list[ProcessRun] = []
    names = [variant.name for _, variant in order]
    with report.progress(names, TimeLeft(expected, plan.rounds, names)) as progress:
        for number, (pair, variant) in enumerate(order, 1):
            name = f"{number}-{variant.name}"
            seconds = None
            if end is not None:
                share = (end - time.monotonic()) / (len(order) - len(done))
                compared = progress.clock.of_stage(variant.name, "comparing outputs")
                seconds = share - (compared or 0.0)
            job = _job(plan, variant, folder / name, seconds)
            progress.start()
            result = processes.run(
                job,
                environment(plan, variant, job.launches),
                logs / f"{name}.log",
                progress.step,
                variant.name,
            )
            plan = replace(plan, rounds=min(plan.rounds, len(result.rounds)))
            progress.end(plan.rounds)
            if variant.launches and plan.layers:
                require_matching_layers(plan.layers, result)
            done.append(ProcessRun(number, pair, variant, result))
    # Round k has the same prompts in every process; rounds that not all processes ran are dropped.
    for run in done:
        del run.result.rounds[plan.rounds :]
    return plan, done


def _job(plan: Plan, variant: Variant, folder: Path, seconds: float | None) -> Job:
    return Job(
        metric=plan.metric,
        arguments=arguments(plan, variant),
        server=server_arguments(plan, variant),
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


def require_matching_layers(patterns: str, result: Result) -> None:
    """Raise unless each of the patterns matches a layer of the model.

    Raises:
        WorkspaceError: the pattern, and names of layers.
    """
    names = {name for counted in result.layers.values() for name in counted}
    for pattern in checks.split_patterns(patterns):
        if not checks.matching(pattern, names):
            raise WorkspaceError(
                f"LAYERS: {pattern!r} matches none of the model's {len(names)} layers; "
                f"examples: {', '.join(layers.one_of_each(names))}"
            )
