# SPDX-License-Identifier: Apache-2.0
"""The ratio custom / stock, and the verdict on it.

Round k of pair i runs the same prompts in both variants, one process after the other, so the
ratio is taken pair by pair: r[i][k] = custom[i][k] / stock[i][k]. The result is their median with
a distribution-free interval from order statistics.
"""

import math
from collections.abc import Sequence
from statistics import median, quantiles

from custom_kernels.bench.intervals import CONFIDENCE, Verdict, median_interval

from workspace.bench.record import EXCLUDES_1, INCLUDES_1, WITHIN, Comparison, Noise

SAME_WITHIN = 0.02
"""A ratio whose whole interval lies within 2 % of 1 counts as "same"."""


def scatter(values: Sequence[float]) -> float:
    """Spread of one variant's rounds: the interquartile range of their logarithms.

    0.05 means about 5 %. Rounds of one process are not independent, so by the interval alone a
    machine that was busy for a minute would look like a slow kernel.
    """
    if len(values) < 2:
        return 0.0
    lower, _, upper = quantiles([math.log(value) for value in values], n=4, method="inclusive")
    return upper - lower


def compare(
    baseline: Sequence[Sequence[float]],
    candidate: Sequence[Sequence[float]],
    higher_is_better: bool,
) -> Comparison:
    """Compare pair by pair and round by round.

    Args:
        baseline: [pairs][rounds] of positive figures.
        candidate: the same shape, in the same order.
        higher_is_better: True for tokens per second, False for seconds.

    Raises:
        ValueError: the shapes differ, are empty, or a figure is not positive and finite.
    """
    shapes = [[len(rounds) for rounds in side] for side in (baseline, candidate)]
    if shapes[0] != shapes[1] or not shapes[0] or 0 in shapes[0]:
        raise ValueError(f"cannot pair rounds of shapes {shapes[0]} and {shapes[1]}")
    figures = [value for side in (baseline, candidate) for rounds in side for value in rounds]
    if not all(math.isfinite(value) and value > 0 for value in figures):
        raise ValueError("a figure is not positive and finite")
    ratios = [
        [new / old for new, old in zip(new_rounds, old_rounds, strict=True)]
        for new_rounds, old_rounds in zip(candidate, baseline, strict=True)
    ]
    flat = [ratio for rounds in ratios for ratio in rounds]
    low, high, coverage = median_interval(flat)
    pairs = [median(rounds) for rounds in ratios]
    noise = max(
        scatter([value for rounds in side for value in rounds]) for side in (baseline, candidate)
    )
    verdict, because = _verdict(low, high, coverage, pairs, noise, higher_is_better)
    return Comparison(
        ratio=median(flat),
        interval=(low, high),
        coverage=coverage,
        pairs=pairs,
        scatter=noise,
        verdict=verdict,
        because=because,
    )


def outside(comparison: Comparison, noise: Noise | None) -> Comparison:
    """The comparison with the noise of this machine: a verdict whose interval is not wholly outside
    of the band becomes ambiguous."""
    nearest = min(abs(math.log(bound)) for bound in comparison.interval)
    because, verdict = comparison.because, comparison.verdict
    if noise and verdict in ("faster", "slower") and nearest <= math.log1p(noise.band):
        verdict, because = "ambiguous", f"stock differs from itself by up to {noise.band:.1%} here"
    return comparison.model_copy(update={"noise": noise, "verdict": verdict, "because": because})


def _verdict(
    low: float,
    high: float,
    coverage: float,
    pairs: Sequence[float],
    noise: float,
    higher_is_better: bool,
) -> tuple[Verdict, str]:
    if len(pairs) < 2:
        because = "one pair does not show how much processes differ; use REPEATS=2 or more"
        return "ambiguous", because
    if coverage < CONFIDENCE:
        return "ambiguous", "too few rounds for a 95 % interval"
    if low >= 1 - SAME_WITHIN and high <= 1 + SAME_WITHIN:
        return "same", f"{WITHIN} {SAME_WITHIN:.0%} of 1"
    if low <= 1 <= high:
        return "ambiguous", INCLUDES_1
    if min(abs(math.log(low)), abs(math.log(high))) < noise:
        return "ambiguous", f"rounds of one variant scatter by {noise:.0%}; is the machine busy?"
    above = low > 1
    if any((pair > 1) != above for pair in pairs):
        return "ambiguous", "the pairs point in different directions"
    return ("faster" if above == higher_is_better else "slower"), EXCLUDES_1
