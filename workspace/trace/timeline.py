# SPDX-License-Identifier: Apache-2.0
"""The steps in a trace of torch's profiler, and what the device did in each.

vLLM's workers put a range around each step whose name says how many requests were in it and how
many tokens (`execute_context_8(4096)_generation_0(0)`: 8 prompts of 4096 tokens in all). On a GPU
the device does kernels, copies and fills: each belongs to the step in which it was launched. On a
CPU the ops that are not part of another op take their place.

Where kernels overlap, the time belongs to the one that started first, so that all of them together
take as long as the device was busy.
"""

import bisect
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from workspace.bench.worker import LAYER
from workspace.host.errors import WorkspaceError

Phase = Literal["prefill", "decode", "mixed"]

STEP = re.compile(r"execute_(?:\w*_)?context_(\d+)\((\d+)[^)]*\)_generation_(\d+)\((\d+)")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of events on a GPU."""
RUNTIME = ("cuda_runtime", "cuda_driver")
"""Of calls on the host that launch them."""


@dataclass(frozen=True)
class Piece:
    """A kernel or an op: its name, begin and own time in µs, and the layers that it was launched
    in, the innermost last; none where the trace does not say."""

    name: str
    start: float
    us: float
    layers: tuple[str, ...] = ()


@dataclass
class Step:
    """A step of the engine: tokens of prompts and of requests that are continued, its pieces in
    their order, and the µs until the next step begins on the device; None of the last one."""

    prompts: int
    prompt_tokens: int
    continued: int
    continued_tokens: int
    start: float
    thread: Any
    pieces: list[Piece] = field(default_factory=list)
    us: float | None = None

    @property
    def phase(self) -> Phase:
        if self.prompt_tokens and self.continued_tokens:
            return "mixed"
        return "prefill" if self.prompt_tokens else "decode"

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.continued_tokens

    @property
    def requests(self) -> int:
        return self.prompts + self.continued

    @property
    def busy_us(self) -> float:
        return sum(piece.us for piece in self.pieces)


def read(path: Path) -> list[Step]:
    """The steps of one worker's trace.

    Raises:
        WorkspaceError: there is no step in it, or the file is damaged.
    """
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt") as file:
            events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise WorkspaceError(f"{path} is not a trace of torch's profiler: {error}") from None
    found = sorted(_steps(events), key=lambda step: step.start)
    if not found:
        raise WorkspaceError(f"{path} has no step of vLLM's engine in it; trace again")
    on_device = any(event.get("cat") in DEVICE for event in events)
    pieces = _on_device(events) if on_device else _on_host(events, found[0].thread)
    starts = [step.start for step in found]
    for launched, piece in _without_overlap(pieces):
        if (index := bisect.bisect_right(starts, launched) - 1) >= 0:
            found[index].pieces.append(piece)
    for step, following in pairwise(found):
        step.us = _begin(following) - _begin(step)
    return found


def _begin(step: Step) -> float:
    return step.pieces[0].start if step.pieces else step.start


def _steps(events: Sequence[dict[str, Any]]) -> Iterator[Step]:
    for event in events:
        match = STEP.match(event["name"]) if event.get("cat") == "user_annotation" else None
        if match is None:
            continue
        prompts, prompt_tokens, continued, tokens = map(int, match.groups())
        if prompt_tokens or tokens:  # there are steps without any, behind the last request
            yield Step(prompts, prompt_tokens, continued, tokens, event["ts"], event["tid"])


def _on_device(events: Sequence[dict[str, Any]]) -> list[tuple[float, Piece]]:
    """Kernels, copies and fills with when each was launched."""
    calls = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in RUNTIME and "correlation" in event.get("args", {})
    }
    ranges = _Ranges(events)
    result = []
    for event in events:
        if event.get("cat") not in DEVICE:
            continue
        call = calls.get(event.get("args", {}).get("correlation"))
        launched = call["ts"] if call else event["ts"]
        inside = ranges.around(call["tid"], launched) if call else ()
        result.append((launched, Piece(event["name"], event["ts"], event["dur"], inside)))
    return result


def _on_host(events: Sequence[dict[str, Any]], thread: Any) -> list[tuple[float, Piece]]:
    """The ops of a thread that are not part of another one."""
    ops = [e for e in events if e.get("cat") == "cpu_op" and e["tid"] == thread]
    ranges = _Ranges(events)
    result: list[tuple[float, Piece]] = []
    end = float("-inf")
    for op in sorted(ops, key=lambda e: (e["ts"], -e["dur"])):
        if op["ts"] >= end:
            end = op["ts"] + op["dur"]
            inside = ranges.around(thread, op["ts"])
            result.append((op["ts"], Piece(op["name"], op["ts"], op["dur"], inside)))
    return result


def _without_overlap(pieces: list[tuple[float, Piece]]) -> Iterator[tuple[float, Piece]]:
    end = float("-inf")
    for launched, piece in sorted(pieces, key=lambda one: one[1].start):
        stop = piece.start + piece.us
        own = max(0.0, stop - max(piece.start, end))
        end = max(end, stop)
        yield launched, Piece(piece.name, piece.start, own, piece.layers)


class _Ranges:
    """The ranges of layers on each thread of the host, which lie in each other."""

    def __init__(self, events: Sequence[dict[str, Any]]) -> None:
        self._of: dict[Any, list[_Range]] = {}
        named = [event for event in events if event["name"].startswith(LAYER)]
        for event in sorted(named, key=lambda e: (e["ts"], -e["dur"])):
            if event.get("cat") != "user_annotation":
                continue
            ranges = self._of.setdefault(event["tid"], [])
            before = ranges[-1] if ranges else None
            while before is not None and before.end <= event["ts"]:
                before = before.outer
            name = event["name"].removeprefix(LAYER)
            ranges.append(_Range(event["ts"], event["ts"] + event["dur"], name, before))

    def around(self, thread: Any, time: float) -> tuple[str, ...]:
        """The names of the ranges that hold this moment, the innermost last."""
        ranges = self._of.get(thread, [])
        index = bisect.bisect_right(ranges, time, key=lambda one: one.start) - 1
        one = ranges[index] if index >= 0 else None
        names: list[str] = []
        while one is not None:
            if one.end >= time:
                names.append(one.name)
            one = one.outer
        return tuple(reversed(names))


@dataclass(frozen=True)
class _Range:
    start: float
    end: float
    name: str
    outer: "_Range | None"
