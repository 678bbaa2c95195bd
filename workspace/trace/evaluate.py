# SPDX-License-Identifier: Apache-2.0
"""Make the record from the traces: what each kernel belongs to and takes, checks, provenance."""

from datetime import UTC, datetime
from pathlib import Path

from workspace.bench import checks, provenance
from workspace.bench.plan import Plan
from workspace.bench.variants import Variant, common_settings, engine_arguments
from workspace.fork.tree_state import shown
from workspace.host.paths import ROOT
from workspace.host.text import make_command
from workspace.pins.release import to_repeat, tree
from workspace.trace import summary, timeline
from workspace.trace.messages import Traced
from workspace.trace.record import Record, SideRecord
from workspace.verbs import Trace

ATTRIBUTED = 0.95
"""Of the time in which the device is busy, at least."""


def evaluate(
    options: Trace,
    plan: Plan,
    traced: list[tuple[Variant, Traced]],
    path: Path,
    started: datetime,
    load: float,
) -> Record:
    """Read the traces, keep them beside the record, check what ran.

    Args:
        path: where the record will be.
        load: the machine's load average before the run.
    """
    modules = frozenset[str]().union(*(ran.modules for _, ran in traced))
    expected = provenance.expected(plan.device.kind, modules)
    failures: list[str] = []
    made: list[SideRecord] = []
    for variant, ran in traced:
        failures += checks.launches(plan, variant.name, ran, variant.launches)
        failures += checks.imports(variant.name, ran, variant.python_path or tree(), expected)
        made.append(_side(plan, variant, ran, path))
        for phase in made[-1].phases:
            if phase.attributed < ATTRIBUTED:
                failures.append(
                    f"{variant.name}: {1 - phase.attributed:.0%} of the time of {phase.phase} "
                    "belongs to kernels of which it is unknown what they are part of"
                )
    _, last = traced[-1]
    sources, errors = provenance.collect(last.kernels_source_hash, last.environment, load)
    device, gpu = plan.device, last.environment.get("device")
    return Record(
        run=path.stem,
        started=started.isoformat(timespec="seconds"),
        duration_s=round((datetime.now(UTC) - started).total_seconds(), 1),
        valid=not failures and not errors,
        failures=[*failures, *errors],
        command=command(options, plan),
        model=plan.model.record(last.dtype),
        device=device.name if device.kind == "cpu" else f"{plan.tensor_parallel} x {gpu}",
        device_kind=device.kind,
        tensor_parallel=plan.tensor_parallel,
        eager=plan.eager,
        bytes_per_second=last.bytes_per_second,
        flops_per_second=last.flops_per_second,
        sides=made,
        provenance=sources,
    )


def _side(plan: Plan, variant: Variant, ran: Traced, path: Path) -> SideRecord:
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    for rank, written in enumerate(ran.traces):
        kept.append(path.with_name(f"{path.stem}-{variant.name}-rank{rank}.pt.trace.json.gz"))
        written.replace(kept[-1])
    phases = summary.phases(
        timeline.read(kept[0]), ran.linear, ran.bytes_per_second, ran.flops_per_second
    )
    arguments = engine_arguments(plan, variant)
    return SideRecord(
        name=variant.name,
        # A record may be published: without the checkout's absolute path.
        arguments=[argument.removeprefix(f"{ROOT}/") for argument in arguments],
        environment={**common_settings(plan), **variant.switches},
        traces=[shown(one) for one in kept],
        launches=ran.launches,
        untraced_s=ran.untraced_s,
        traced_s=ran.traced_s,
        phases=phases,
    )


def command(options: Trace, plan: Plan) -> str:
    """The `make` command that traces the same again, every default written out."""
    return make_command(
        "trace",
        MODEL=plan.model.requested_path or plan.model.name,
        OP=options.op,
        BACKEND=options.backend,
        LAYERS=options.layers,
        QUANTIZATION=options.quantization,
        BASELINE=options.baseline,
        ENGINE=options.engine,
        INPUT_LEN=plan.input_len,
        OUTPUT_LEN=plan.output_len,
        NUM_PROMPTS=plan.num_prompts,
        TP=plan.tensor_parallel,
        EAGER=int(plan.eager),
        VLLM_VERSION=to_repeat(),
    )
