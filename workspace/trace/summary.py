# SPDX-License-Identifier: Apache-2.0
"""The usual step of each phase: what every kernel takes of it, and the least that it could."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean, median

from workspace.trace.messages import Linear
from workspace.trace.parts import LM_HEAD, OTHER, attribute, short
from workspace.trace.record import PhaseRecord, Row
from workspace.trace.timeline import Phase, Step

PHASES: tuple[Phase, ...] = ("prefill", "mixed", "decode")
ACTIVATION_BYTES = 2
"""Of a value that a linear layer reads or writes."""

_ARGUMENTS = re.compile(r"<[^<>]*>|\([^()]*\)")


def phases(
    steps: Sequence[Step],
    linear: Sequence[Linear],
    bytes_per_second: float | None,
    flops_per_second: Mapping[str, float],
) -> list[PhaseRecord]:
    """The phases of a trace. The last step of all has no next one, so it counts only if there is no
    other of its phase; then it has no gaps."""
    found = []
    for phase in PHASES:
        of_phase = [step for step in steps if step.phase == phase]
        counted = [step for step in of_phase if step.us is not None] or of_phase
        if not counted:
            continue
        # Of a batch that begins or ends one request at a time, the steps that are like most others.
        sizes = Counter((step.tokens, step.requests) for step in counted)
        usual = max(sizes, key=lambda size: (sizes[size], size))
        counted = [step for step in counted if (step.tokens, step.requests) == usual]
        floors = _floors(counted, linear, bytes_per_second, flops_per_second)
        found.append(_phase(phase, counted, [one.name for one in linear], floors))
    return found


def _phase(
    phase: Phase, steps: Sequence[Step], linear: Sequence[str], floors: Mapping[str, float]
) -> PhaseRecord:
    calls: defaultdict[tuple[str, str], int] = defaultdict(int)
    us: defaultdict[tuple[str, str], float] = defaultdict(float)
    for step in steps:
        for part, piece in attribute(step, linear):
            key = (part, kernel_name(piece.name))
            calls[key] += 1
            us[key] += piece.us
    of_part: defaultdict[str, float] = defaultdict(float)
    for (part, _), time in us.items():
        of_part[part] += time
    rows = [
        Row(
            part=part,
            kernel=kernel,
            calls=calls[part, kernel] / len(steps),
            us=time / len(steps),
            # What a part needs at least is shared out among its kernels as its time is.
            roofline_us=floors[part] * time / of_part[part] if part in floors else None,
        )
        for (part, kernel), time in sorted(us.items(), key=lambda one: -one[1])
    ]
    busy = median(step.busy_us for step in steps)
    times = [step.us or step.busy_us for step in steps]
    other = of_part[OTHER] / len(steps)
    return PhaseRecord(
        phase=phase,
        steps=len(steps),
        requests=mean(step.requests for step in steps),
        tokens=mean(step.tokens for step in steps),
        us=median(times),
        fastest_us=min(times),
        slowest_us=max(times),
        busy_us=busy,
        attributed=1 - other / busy if busy else 1.0,
        rows=rows,
    )


def _floors(
    steps: Sequence[Step],
    linear: Sequence[Linear],
    bytes_per_second: float | None,
    flops_per_second: Mapping[str, float],
) -> dict[str, float]:
    """The least µs of a step for the linear layers of each name: bytes of the layer, of x and of y
    over the rate of copies, or 2 · M · N · K over that of products, whichever is longer."""
    if bytes_per_second is None or not flops_per_second:
        return {}
    result: defaultdict[str, float] = defaultdict(float)
    tokens = mean(step.tokens for step in steps)
    requests = mean(step.requests for step in steps)
    narrow = max(flops_per_second.values())
    wide = flops_per_second.get("bfloat16", narrow)
    for layer in linear:
        part = short(layer.name)
        m = requests if part == LM_HEAD else tokens
        moved = layer.bytes + ACTIVATION_BYTES * m * (layer.n + layer.k)
        rate = narrow if layer.bytes < 1.5 * layer.n * layer.k else wide
        seconds = max(moved / bytes_per_second, 2 * m * layer.n * layer.k / rate)
        result[part] += seconds * 1e6
    return dict(result)


def kernel_name(name: str) -> str:
    """A kernel's name without its template's and function's arguments."""
    before = ""
    name = name.replace("(anonymous namespace)", "").removeprefix("void ")
    while before != name:
        before, name = name, _ARGUMENTS.sub("", name)
    return re.sub(r"^(::)+|\s+", "", name) or before
