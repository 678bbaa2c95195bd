# SPDX-License-Identifier: Apache-2.0
"""Time two implementations of an operation against each other on a GPU, as inference would run
them.

- **Cold L2.** In inference a layer's weights come from HBM: by the time its turn comes again, the
  other layers have pushed them out. So each CUDA graph runs over several input sets in turn,
  together at least twice the size of L2.
- **No launch gaps.** Both sides are captured into CUDA graphs and timed by events around a replay.
- **Interleaved.** Replays alternate in blocks A B B A without a pause, and are compared block by
  block, so that a drift of clocks or temperature hits both sides alike.
- **Checked while measured.** Inputs are fresh random numbers in every repetition. Before the first
  and after the last repetition the outputs are poisoned with NaN, and what a replay leaves there is
  compared with float64.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

DIFFERENT_FROM = 0.01
"""Two sides are called different when their ratio is surely further than this from 1 ..."""
SAME_WITHIN = 0.02
"""... and the same when it is surely within this."""

_CHECKED_ROWS = 48


@dataclass(frozen=True)
class Case:
    """One shape at which an operation is measured."""

    labels: dict[str, str | int]
    """What tells it from the others, for example ``{"model": ..., "layer": "qkv", "M": 16}``."""
    empty_inputs: Callable[[torch.device], tuple[torch.Tensor | None, ...]]
    """Allocates the operation's arguments, not yet filled."""
    fill: Callable[[Sequence[torch.Tensor | None]], None]
    """Fills them in place with fresh random numbers."""
    flops: float
    """Floating-point operations of one call."""
    bytes: float
    """The fewest bytes one call moves through HBM: each input read once, the output written
    once."""
    tolerance: float
    """Largest acceptable ‖out - exact‖ / ‖exact‖."""


@dataclass(frozen=True)
class Side:
    """Times of one side, in microseconds per call."""

    median: float
    p20: float
    p80: float
    error: float
    """Largest ‖out - exact‖ / ‖exact‖ seen in the checks."""


@dataclass(frozen=True)
class Comparison:
    """One case, measured on both sides."""

    case: Case
    custom: Side
    baseline: Side
    ratio: float
    """Median over blocks of baseline time / custom time: above 1 the custom side is faster."""
    low: float
    high: float
    """95 % confidence interval of the ratio."""
    sets: int
    """Input sets that each replay goes through."""
    blocks: int
    """Blocks of four replays that the ratio is the median of."""

    @property
    def verdict(self) -> str:
        """SAME, FASTER, SLOWER, or AMBIGUOUS when the interval does not settle it."""
        if self.low > 1 + DIFFERENT_FROM:
            return "FASTER"
        if self.high < 1 - DIFFERENT_FROM:
            return "SLOWER"
        if self.low >= 1 - SAME_WITHIN and self.high <= 1 + SAME_WITHIN:
            return "SAME"
        return "AMBIGUOUS"


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches at best, measured now."""

    bytes_per_second: float
    """A large device-to-device copy, bytes read plus bytes written."""
    flops_per_second: float
    """An 8192-cubed bfloat16 product of random numbers through torch."""


class WrongResultError(RuntimeError):
    """A side does not compute what the reference does, so its time means nothing."""


def compare(
    case: Case,
    custom: Callable[..., torch.Tensor],
    baseline: Callable[..., torch.Tensor],
    exact: Callable[..., torch.Tensor],
    device: torch.device,
    seconds: float = 0.25,
    repetitions: int = 3,
) -> Comparison:
    """Measure ``custom`` against ``baseline`` at ``case``, for about ``seconds`` of device time.

    Raises WrongResultError if an output differs from ``exact`` by more than the case's tolerance or
    has an element that was not written.
    """
    sets = _input_sets(case, device)
    sides = {"custom": _Graph(custom, sets), "baseline": _Graph(baseline, sets)}
    errors = dict.fromkeys(sides, 0.0)

    def check() -> None:
        for name, side in sides.items():
            for inputs in sets:
                case.fill(inputs)
            errors[name] = max(errors[name], side.error(case, exact))

    check()
    once = max(side.replay_seconds() for side in sides.values())
    blocks = max(3, min(100, math.ceil(seconds / repetitions / (4 * once))))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for inputs in sets:
            case.fill(inputs)
        # A B B A: whatever drifts, and whatever the one leaves behind for the next, weighs on both
        # sides alike.
        events = [
            (name, sides[name].timed_replay())
            for _ in range(blocks)
            for name in ("custom", "baseline", "baseline", "custom")
        ]
        torch.cuda.synchronize(device)
        elapsed = [
            (name, start.elapsed_time(end) * 1e3 / len(sets)) for name, (start, end) in events
        ]
        for block in range(blocks):
            for name in sides:
                two = [time for side, time in elapsed[4 * block : 4 * block + 4] if side == name]
                times[name].append(statistics.mean(two))
    check()

    ratios = [base / ours for base, ours in zip(times["baseline"], times["custom"], strict=True)]
    low, high = _median_interval(ratios)
    return Comparison(
        case=case,
        custom=_side(times["custom"], errors["custom"]),
        baseline=_side(times["baseline"], errors["baseline"]),
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        sets=len(sets),
        blocks=len(ratios),
    )


def ceilings(device: torch.device) -> Ceilings:
    """Measure what the device can do; about a second."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source))
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = _median_seconds(lambda: a @ b)
    return Ceilings(2 * source.numel() / copy, 2 * size**3 / product)


class _Graph:
    """One side, captured once over all input sets."""

    def __init__(
        self, function: Callable[..., torch.Tensor], sets: Sequence[tuple[Any, ...]]
    ) -> None:
        self._sets = sets
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # outside of the capture: compiles, searches, loads modules
            for inputs in sets[:2]:
                function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = [function(*inputs) for inputs in sets]

    def timed_replay(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        return start, end

    def replay_seconds(self) -> float:
        self._graph.replay()
        start, end = self.timed_replay()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def error(self, case: Case, exact: Callable[..., torch.Tensor]) -> float:
        for output in self._outputs:
            output.fill_(math.nan)
        self._graph.replay()
        for output in self._outputs:
            if not torch.isfinite(output).all():
                raise WrongResultError(
                    f"{case.labels}: the output has elements that are not finite or not written"
                )
        worst = 0.0
        for inputs, output in {
            0: (self._sets[0], self._outputs[0]),
            -1: (self._sets[-1], self._outputs[-1]),
        }.values():
            worst = max(worst, _relative_error(inputs, output, exact))
        if worst > case.tolerance:
            raise WrongResultError(
                f"{case.labels}: relative error {worst:.1e}, {case.tolerance:.1e} is allowed"
            )
        return worst


def _relative_error(
    inputs: tuple[Any, ...], output: torch.Tensor, exact: Callable[..., torch.Tensor]
) -> float:
    """‖out - exact‖ / ‖exact‖ over some rows, the first and the last among them; the first input
    has a row per token."""
    x, *others = inputs
    rows = torch.linspace(0, x.shape[0] - 1, min(_CHECKED_ROWS, x.shape[0])).long().to(x.device)
    wanted = exact(x[rows], *others)
    return float((output[rows].double() - wanted).norm() / wanted.norm())


def _input_sets(case: Case, device: torch.device) -> list[tuple[torch.Tensor | None, ...]]:
    """Enough input sets to hold twice the L2 between two uses of the same one."""
    l2_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
    count = max(2, 1 + math.ceil(2 * l2_bytes / case.bytes))
    sets = [case.empty_inputs(device) for _ in range(count)]
    for inputs in sets:
        case.fill(inputs)
    return sets


def _side(times: list[float], error: float) -> Side:
    quantiles = statistics.quantiles(times, n=5)
    return Side(statistics.median(times), quantiles[0], quantiles[3], error)


def _median_interval(values: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the median from order statistics, without any assumed
    distribution."""
    ordered = sorted(values)
    middle, reach = len(ordered) / 2, 0.98 * math.sqrt(len(ordered))
    low = max(0, math.floor(middle - reach))
    high = min(len(ordered) - 1, math.ceil(middle + reach))
    return ordered[low], ordered[high]


def _median_seconds(function: Callable[[], Any], repeats: int = 20) -> float:
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)
