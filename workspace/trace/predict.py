# SPDX-License-Identifier: Apache-2.0
"""`make predict`: what a measured kernel will bring in the engine, from a trace of stock vLLM and a
record of `make bench-kernels`, before any engine is started.

For every part of a step that the record measured, at the number of tokens that is nearest,

    step, predicted = step - Σ part · (1 - 1 / ratio)

where the ratio is the baseline's time over the kernel's. A step in which the device waits has a
pace that the host sets: then what a kernel saves may become more waiting, what it loses may hide
in it, and the prediction is a range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from custom_kernels.bench import record as kernels
from custom_kernels.command import UsageError
from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from workspace.bench import record as engine
from workspace.bench.report import console
from workspace.host.errors import WorkspaceError
from workspace.trace.parts import LM_HEAD
from workspace.trace.record import PhaseRecord, Record
from workspace.verbs import Predict

PARTS = {
    "rms_norm": ("norm", "input_layernorm", "post_attention_layernorm", "model.norm"),
    "silu_and_mul": ("activation", "mlp.act_fn"),
    "rotary_embedding": ("rotary embedding", "self_attn.rotary_emb", "between self_attn.qkv_proj"),
    "paged_attention": ("attention", "self_attn.attn"),
}
"""How the parts of a trace begin that an operation without linear layers computes."""
NEAR = 2.0
"""A case counts for a step of so many times its tokens at most, or so many times fewer."""
HOST_BOUND = 0.05
"""Share of gaps from which on the host sets the pace."""


@dataclass(frozen=True)
class Change:
    """A part of a step: its µs now and then, the lowest and highest of the interval."""

    part: str
    m: int
    us: float
    ratio: float
    low: float
    high: float

    @property
    def then(self) -> tuple[float, float]:
        return self.us / self.high, self.us / self.low


@dataclass(frozen=True)
class Prediction:
    """A phase with a kernel in it; µs of a step at best and at worst."""

    phase: PhaseRecord
    changes: Sequence[Change]

    @property
    def us(self) -> tuple[float, float]:
        step, gaps = self.phase.us, self.phase.gaps_us
        least, most = (sum(one.then[n] - one.us for one in self.changes) for n in (0, 1))
        if self.host_sets_pace:  # which may keep a gain, and hide a loss as long as the gaps
            least = min(least, max(0.0, least - gaps))
            most = max(most, 0.0)
        return step + least, step + most

    @property
    def host_sets_pace(self) -> bool:
        return self.phase.gaps_us > HOST_BOUND * self.phase.us

    @property
    def ratio(self) -> tuple[float, float]:
        least, most = self.us
        return least / self.phase.us, most / self.phase.us


def run(options: Predict) -> None:
    """Print what each kernel of the record will bring.

    Raises:
        WorkspaceError: a file is missing or of another kind, or they have nothing in common.
    """
    if not options.trace or not options.kernels:
        raise WorkspaceError(
            "name a trace and a record of kernels: make predict TRACE=trace.json "
            "KERNELS=kernels.json"
        )
    trace = _trace(Path(options.trace))
    try:
        measured = kernels.read(Path(options.kernels))
    except UsageError as error:
        raise WorkspaceError(str(error)) from None
    bench = _bench(Path(options.bench), trace) if options.bench else None
    if options.backend and options.backend not in measured.backends:
        known = ", ".join(measured.backends)
        raise WorkspaceError(f"BACKEND={options.backend} is not in {options.kernels}; use {known}")
    phases = trace.sides[0].phases
    found = {
        name: [Prediction(phase, list(changes(trace, phase, measured, name))) for phase in phases]
        for name in ([options.backend] if options.backend else measured.backends)
    }
    if not any(one.changes for every in found.values() for one in every):
        models = sorted({str(row.labels.get("model")) for row in measured.rows})
        raise WorkspaceError(
            f"{options.kernels} has no case that is a part of {options.trace}: "
            f"{measured.operation} of {', '.join(models)}; measure MODEL={trace.model.name} at the "
            f"trace's numbers of tokens, M={','.join(str(round(one.tokens)) for one in phases)}"
        )
    for name, every in found.items():
        if options.backend:
            for one in every:
                console.print(details(f"{measured.operation}.{name}", one))
    console.print(summary(trace, measured, found))
    if bench:
        show_measured(bench, measured.operation, found)


def changes(
    trace: Record, phase: PhaseRecord, measured: kernels.Record, backend: str
) -> Iterator[Change]:
    """The parts of a phase that the record has a case for."""
    operation, model = measured.operation, _model(trace.model.name)
    if operation == "paged_attention" and not (measured.captured and phase.phase == "decode"):
        return  # how long the sequences are is known of captured shapes alone
    rows = [row for row in measured.rows if _model(str(row.labels.get("model"))) == model]
    for part, us in phase.parts().items():
        m = phase.requests if part == LM_HEAD else phase.tokens
        cases = [
            (abs(math.log(int(row.labels["M"]) / m)), int(row.labels["M"]), one)
            for row in rows
            if computes(operation, str(row.labels["layer"]), part)
            and (one := row.timed(backend)) is not None
            and one.ratio is not None
        ]
        distance, measured_m, one = min(cases, key=lambda case: case[0], default=(9.0, 0, None))
        if one is not None and distance <= math.log(NEAR) + 1e-9:
            low, high = one.low or one.ratio or 1, one.high or one.ratio or 1
            yield Change(part, measured_m, us, one.ratio or 1, low, high)


def _model(name: str) -> str:
    """ "Qwen/Qwen2.5-7B" -> "qwen2.5-7b", as the cases of operations call it."""
    return name.rpartition("/")[2].lower()


def computes(operation: str, layer: str, part: str) -> bool:
    """Whether a case of an operation is a part of a trace: "qkv" of `self_attn.qkv_proj`, as is
    "q_proj+k_proj" of a capture of either."""
    if operation in PARTS:
        return part.startswith(PARTS[operation])
    name = "" if part.startswith("between") else part.rpartition(".")[2]
    return name in (layer, f"{layer}_proj", *layer.split("+"))


def round_ratio(every: Sequence[Prediction], output_len: int) -> tuple[float, float]:
    """Of a whole batch: its steps of prompts, and one for each new token after the first."""
    times = [output_len - 1 if one.phase.phase == "decode" else one.phase.steps for one in every]
    now = sum(count * one.phase.us for count, one in zip(times, every, strict=True))
    least, most = (
        sum(count * one.us[n] for count, one in zip(times, every, strict=True)) for n in (0, 1)
    )
    return least / now, most / now


def details(kernel: str, one: Prediction) -> Table:
    """The parts of a phase, now and with the kernel."""
    title = f"{kernel}, {one.phase.phase}: µs of a step"
    result = Table(title=title, title_justify="left")
    result.add_column("part")
    for name in ("now", "measured at M", "times as fast", "predicted"):
        result.add_column(name, justify="right")
    for change in one.changes:
        result.add_row(
            escape(change.part),
            f"{change.us:,.0f}",
            f"{change.m:,}",
            f"{change.ratio:.3f}",
            f"{change.us / change.ratio:,.0f}",
        )
    return result


def summary(trace: Record, measured: kernels.Record, found: dict[str, list[Prediction]]) -> Table:
    """Predicted time of a step over that of now, by kernel and phase."""
    title = (
        f"predicted: time of a step with {measured.operation} of ours / with stock's, "
        f"{escape(trace.model.name)}, {escape(trace.device)}"
    )
    result = Table(title=title, title_justify="left")
    result.add_column("kernel")
    result.add_column("phase")
    for name in ("replaces, of a step", "gaps", "predicted / now"):
        result.add_column(name, justify="right")
    for name, every in found.items():
        for one in every:
            replaced = sum(change.us for change in one.changes) / one.phase.us
            result.add_row(
                name if one is every[0] else "",
                one.phase.phase,
                f"{replaced:.1%}",
                f"{one.phase.gaps_us / one.phase.us:.1%}",
                span(one.ratio) if one.changes else "not measured",
            )
    if any(one.host_sets_pace for every in found.values() for one in every):
        result.caption = "where the device waits, the host may keep a gain, or hide a loss: a range"
    return result


def span(ratio: tuple[float, float]) -> str:
    return f"{ratio[0]:.3f} to {ratio[1]:.3f}"


def show_measured(bench: engine.Record, operation: str, found: dict[str, list[Prediction]]) -> None:
    """Predicted and measured side by side, of the kernels that the engine ran."""
    measured, (low, high) = bench.comparison.ratio, bench.comparison.interval
    ran = sorted({name for variant in bench.variants for name in variant.launches})
    console.print(
        f"measured in the engine: {measured:.3f} [{low:.3f}, {high:.3f}], {', '.join(ran)}"
    )
    for name, every in found.items():
        if f"{operation}.{name}" not in ran:
            continue
        least, most = round_ratio(every, bench.settings.output_len)
        off = max(0.0, low - most, least - high)
        word = "as measured" if off == 0 else f"off by {off:.3f}"
        console.print(f"predicted with {name}: {span((least, most))}, {word}")


def _trace(path: Path) -> Record:
    try:
        made = Record.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise WorkspaceError(
            f"TRACE={path} is not a record of make trace: {_first(error)}"
        ) from None
    if not made.valid:
        raise WorkspaceError(f"TRACE={path}: the trace is not valid; trace again")
    return made


def _bench(path: Path, trace: Record) -> engine.Record:
    """The record of the engine, if it is of the trace's workload."""
    try:
        made = engine.read(path)
    except (OSError, ValidationError) as error:
        raise WorkspaceError(
            f"BENCH={path} is not a record of make bench: {_first(error)}"
        ) from None
    decode = next((one for one in trace.sides[0].phases if one.phase == "decode"), None)
    traced = round(decode.requests) if decode else 0
    if made.settings.metric != "latency" or made.settings.num_prompts != traced:
        raise WorkspaceError(
            f"BENCH={path}: {made.settings.metric} of {made.settings.num_prompts} requests, the "
            f"trace has {traced}; predict METRIC=latency with the trace's NUM_PROMPTS"
        )
    return made


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]
