# SPDX-License-Identifier: Apache-2.0
"""Time implementations of an operation against each other, as inference would run them.

- **Cold L2.** In inference a layer's weights come from HBM: by the time its turn comes again, the
  other layers have pushed them out. So each CUDA graph runs over rotating buffers,
  together at least twice the size of L2.
- **No launch gaps.** Every contender is captured into a CUDA graph, so long that the gap between
  two replays is negligible, and timed by events around a replay.
- **Interleaved.** Replays go in palindromic blocks, A B C C B A, without a pause, and are compared
  block by block, so that a drift of clocks or temperature hits all contenders alike.
- **Checked while measured.** Inputs are fresh random numbers in every repetition. Before the first
  and after the last repetition the outputs are poisoned, and the result of a replay is compared
  with the exact one. Neither the inputs nor what times are taken with may be replaced, nor may a
  part of L2 be set aside. A contender that is wrong, does not fit or cannot run is recorded as
  failed and does not stop the others.

On a CPU the same runs with the host's clock and without graphs: to try out a case, a kernel or this
module itself, not for figures worth recording.
"""

import functools
import math
import statistics
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from custom_kernels.bench import intervals
from custom_kernels.bench.device import Clocks
from custom_kernels.bench.intervals import CONFIDENCE, Verdict, median_interval
from custom_kernels.bench.record import Ceilings, Failed, Row, Timed, rates
from custom_kernels.check.case import Case, Contender
from custom_kernels.check.guards import L2, require_own_clocks
from custom_kernels.check.outputs import one_line
from custom_kernels.check.replay import SIDES, Side

DIFFERENT_FROM = 0.01
"""Two contenders differ if their ratio is further than this from 1 (95 % CI) ..."""
SAME_WITHIN = 0.02
"""... and are the same if the whole CI is within this."""

COLD_FACTOR = 2
"""Bytes between two uses of the same buffers, as a multiple of the size of L2."""
MAX_SETS = 256
"""Sets of rotating buffers at most: an operation so small that it would need more finds its input
in L2 in inference too, where the operation before it has just written it."""
REPLAY_SECONDS = 300e-6
"""A shorter replay goes through the buffers more than once, because there is a gap of a microsecond
or two between replays."""
MAX_ROUNDS = 16


class DeviceLostError(RuntimeError):
    """A contender left the device in an error; nothing in this process can run on it any more."""


# --- measuring ------------------------------------------------------------------------------------


def measure(
    case: Case,
    contenders: Sequence[Contender],
    exact: Callable[..., Any],
    device: torch.device,
    seconds: float = 0.25,
    repetitions: int = 3,
    ceilings: Ceilings | None = None,
) -> Row:
    """Measure all contenders at ``case``.

    Args:
        contenders: the first is the baseline of the ratios.
        exact: computes the exact result from the case's inputs.
        seconds: device time in all, about.
        repetitions: of the whole, each with fresh inputs.
        ceilings: what the rates are set against.

    Raises:
        ValueError: no contenders, or a name twice.
        DeviceLostError: a contender broke the device; anything else that goes wrong with a
            contender is in its result.
    """
    names = [contender.name for contender in contenders]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"contenders must have distinct names, got {names}")
    failures: dict[str, str] = {}
    errors = dict.fromkeys(names, 0.0)
    sets = _rotating_buffers(case, device)
    sides: dict[str, Side] = {}
    l2 = L2(device)

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            try:
                result = action()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            finally:  # the next one must find them as they were, whatever this one died of
                require_own_clocks()
                l2.require_unchanged()
            return result
        except Exception as error:
            failures[name] = one_line(error)
            sides.pop(name, None)
        _still_alive(device, name, failures[name])
        return None

    def build(contender: Contender) -> None:
        reason = contender.unavailable_reason(device)
        if reason is not None:
            failures[contender.name] = reason
            return
        side = SIDES[device.type](contender, case, sets)
        side.warm_up()
        sides[contender.name] = side

    def check(name: str) -> None:
        for inputs in sets:
            case.fill(inputs)
        errors[name] = max(errors[name], sides[name].error(exact))

    for contender in contenders:
        attempt(contender.name, functools.partial(build, contender))
    once = {name: attempt(name, side.replay_seconds) for name, side in list(sides.items())}
    rounds = rounds_for([time for time in once.values() if time is not None])
    if rounds > 1:
        for name, side in list(sides.items()):
            attempt(name, functools.partial(side.extend, rounds))
    for name in list(sides):
        attempt(name, functools.partial(check, name))

    fastest_first = sum(once[name] for name in sides) * rounds
    blocks = max(3, min(100, math.ceil(seconds / repetitions / (2 * fastest_first or 1))))
    times: dict[str, list[list[float]]] = {name: [] for name in sides}
    clocks = Clocks(device)
    for _ in range(repetitions if sides else 0):
        for inputs in sets:
            case.fill(inputs)
        order = [name for _ in range(blocks) for name in palindrome(list(sides))]
        pending = [(name, sides[name].timed_replay()) for name in order]
        clocks.sample()  # while the device is busy
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls = len(sets) * rounds
        elapsed = [(name, seconds_of() * 1e6 / calls) for name, seconds_of in pending]
        for name, values in per_block(elapsed, blocks).items():
            times[name].append(values)
    for name in list(sides):
        attempt(name, functools.partial(check, name))

    baseline = None if names[0] in failures else times[names[0]]
    results: dict[str, Timed | Failed] = {}
    for name in names:
        if name in failures:
            results[name] = Failed(failure=failures[name])
        else:
            base = None if name == names[0] else baseline
            results[name] = compare(times[name], base, errors[name], case, ceilings)
    return Row(
        labels=case.labels,
        flops=case.flops,
        bytes=case.bytes,
        peak=case.peak,
        input_sets=len(sets),
        rounds=rounds,
        cold=len(sets) * case.bytes >= COLD_FACTOR * _l2_bytes(device),
        clocks=clocks.summary(),
        contenders=results,
        calls=case.calls,
    )


def palindrome(names: Sequence[str]) -> list[str]:
    """A B C C B A: a drift, and what one leaves in caches for the next, affects all alike."""
    return [*names, *reversed(names)]


def per_block(elapsed: Sequence[tuple[str, float]], blocks: int) -> dict[str, list[float]]:
    """By name, the mean of its two times in each block, in order."""
    if blocks < 1 or len(elapsed) % blocks:
        raise ValueError(f"{len(elapsed)} times are not {blocks} blocks")
    size = len(elapsed) // blocks
    means: dict[str, list[float]] = {}
    for start in range(0, len(elapsed), size):
        block: dict[str, list[float]] = {}
        for name, value in elapsed[start : start + size]:
            block.setdefault(name, []).append(value)
        for name, values in block.items():
            means.setdefault(name, []).append(statistics.mean(values))
    return means


def rounds_for(seconds: Collection[float]) -> int:
    """How often a replay must go through the buffers to last REPLAY_SECONDS for the fastest
    contender."""
    fastest = min(seconds, default=REPLAY_SECONDS)
    return max(1, min(MAX_ROUNDS, math.ceil(REPLAY_SECONDS / max(fastest, 1e-9))))


def compare(
    own: Sequence[Sequence[float]],
    base: Sequence[Sequence[float]] | None,
    error: float,
    case: Case,
    ceilings: Ceilings | None = None,
) -> Timed:
    """A contender's result from its times and the baseline's, [repetitions][blocks] in
    microseconds; without a ratio if ``base`` is None."""
    flat = [value for repetition in own for value in repetition]
    us, (p20, p80) = statistics.median(flat), _spread(flat)
    reached = rates(us, case.flops, case.bytes, case.peak, ceilings)
    timed = Timed(us=us, p20=p20, p80=p80, error=error, blocks=len(flat), **reached.model_dump())
    if base is None:
        return timed
    ratios = [
        [theirs / ours for theirs, ours in zip(base_blocks, own_blocks, strict=True)]
        for base_blocks, own_blocks in zip(base, own, strict=True)
    ]
    every = [ratio for repetition in ratios for ratio in repetition]
    low, high, _ = median_interval(every)
    repetitions = [statistics.median(repetition) for repetition in ratios]
    comparison = {
        "ratio": statistics.median(every),
        "low": low,
        "high": high,
        "repetitions": repetitions,
        "verdict": verdict(low, high, len(every), repetitions),
    }
    return timed.model_copy(update=comparison)


def verdict(low: float, high: float, blocks: int, repetitions: Sequence[float] = ()) -> Verdict:
    """Faster or slower: the whole interval is more than 1 % off 1, and every repetition agrees.
    Same: the interval is within 2 %. Ambiguous: anything else, and too few blocks for an
    interval."""
    found = intervals.verdict(low, high, DIFFERENT_FROM, SAME_WITHIN)
    agreed = {"faster": min(repetitions, default=2) > 1, "slower": max(repetitions, default=0) < 1}
    enough = intervals.coverage(blocks, 1) >= CONFIDENCE
    return found if enough and agreed.get(found, True) else "ambiguous"


def _spread(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    quantiles = statistics.quantiles(values, n=5, method="inclusive")
    return quantiles[0], quantiles[3]


def _rotating_buffers(case: Case, device: torch.device) -> list[tuple[Any, ...]]:
    """Enough sets of inputs for COLD_FACTOR times the L2 between two uses of the same set."""
    wanted = 1 + math.ceil(COLD_FACTOR * _l2_bytes(device) / max(case.bytes, 1.0))
    sets = [case.empty_inputs(device) for _ in range(max(2, min(MAX_SETS, wanted)))]
    for inputs in sets:
        case.fill(inputs)
    return sets


def _l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    size: int = torch.cuda.get_device_properties(device).L2_cache_size
    return size


def _still_alive(device: torch.device, name: str, failure: str) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception as error:
        raise DeviceLostError(f"{name} left the GPU in an error: {failure}") from error
