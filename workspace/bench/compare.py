# SPDX-License-Identifier: Apache-2.0
"""The ratio custom / stock, and the verdict on it.

Round k of pair i runs the same prompts in both variants, one process after the other, so the
ratio is taken pair by pair: r[i][k] = custom[i][k] / stock[i][k]. The result is the geometric mean
of the medians of the pairs.

Rounds of one process are alike, processes differ: the sample is one figure per process. With
x[v][i] the median logarithm of process i of variant v, n pairs and s² the variance in a variant,

    log ratio ± t · s · sqrt(2 / n),    s² = Σ (x[v][i] - mean(x[v]))² / (2 (n - 1)),

t being Student's of 2 (n - 1) degrees of freedom. Runs of BASELINE=self of the same setting add
their sums and degrees of freedom to s². Source: T. Kalibera and R. Jones, Rigorous benchmarking in
reasonable time, ISMM 2013: what is repeated at the highest level decides the interval.
"""

import math
from collections.abc import Sequence
from statistics import fmean, median, quantiles

from custom_kernels.bench.intervals import CONFIDENCE, Verdict, median_interval, student

from workspace.bench.record import (
    EXCLUDES_1,
    INCLUDES_1,
    WITHIN,
    Comparison,
    Noise,
    Record,
    higher_is_better,
)

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


def spread(variants: Sequence[Sequence[Sequence[float]]]) -> tuple[float, int]:
    """How far processes of one variant are apart: the sum of squares of their median logarithms
    around the mean of their variant, and its degrees of freedom.

    Args:
        variants: [variants][processes][rounds] of positive figures.
    """
    medians = [[median(map(math.log, rounds)) for rounds in side] for side in variants]
    squares = sum((one - fmean(side)) ** 2 for side in medians for one in side)
    return squares, sum(len(side) - 1 for side in medians)


def compare(
    baseline: Sequence[Sequence[float]],
    candidate: Sequence[Sequence[float]],
    higher_is_better: bool,
    noise: Noise | None = None,
) -> Comparison:
    """Compare pair by pair and round by round.

    Args:
        baseline: [pairs][rounds] of positive figures.
        candidate: the same shape, in the same order.
        higher_is_better: True for tokens per second, False for seconds.
        noise: of this machine, from BASELINE=self. A verdict whose interval is not wholly outside
            of its band becomes ambiguous.

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
    pairs = [median(rounds) for rounds in ratios]
    ratio = math.exp(fmean(map(math.log, pairs)))
    squares, freedom = spread((baseline, candidate))
    if noise:
        squares, freedom = squares + noise.squares, freedom + noise.freedom
    if freedom:
        half = student(freedom) * math.sqrt(squares / freedom * 2 / len(pairs))
        low, high, coverage = ratio * math.exp(-half), ratio * math.exp(half), CONFIDENCE
    else:
        low, high, coverage = median_interval(ratios[0])
    scattered = max(
        scatter([value for rounds in side for value in rounds]) for side in (baseline, candidate)
    )
    verdict, because = _verdict(low, high, pairs, scattered, noise, higher_is_better)
    return Comparison(
        ratio=ratio,
        interval=(low, high),
        coverage=coverage,
        pairs=pairs,
        scatter=scattered,
        verdict=verdict,
        because=because,
        noise=noise,
    )


def of_record(record: Record, noise: Noise | None = None) -> Comparison:
    """The comparison of a recorded run, from the figures of its processes."""
    old, new = record.by_process
    return compare(old, new, higher_is_better(record.unit), noise)


def _verdict(
    low: float,
    high: float,
    pairs: Sequence[float],
    scattered: float,
    noise: Noise | None,
    higher_is_better: bool,
) -> tuple[Verdict, str]:
    if len(pairs) < 2:
        because = "one pair does not show how much processes differ; use REPEATS=2 or more"
        return "ambiguous", because
    if low >= 1 - SAME_WITHIN and high <= 1 + SAME_WITHIN:
        return "same", f"{WITHIN} {SAME_WITHIN:.0%} of 1"
    if low <= 1 <= high:
        return "ambiguous", INCLUDES_1
    nearest = min(abs(math.log(low)), abs(math.log(high)))
    if noise and nearest <= math.log1p(noise.band):
        return "ambiguous", f"stock differs from itself by up to {noise.band:.1%} here"
    # Two pairs may be alike by chance: the rounds have to say the same.
    if not noise and nearest < scattered:
        because = f"rounds of one variant scatter by {scattered:.0%}; is the machine busy?"
        return "ambiguous", because
    above = low > 1
    if any((pair > 1) != above for pair in pairs):
        return "ambiguous", "the pairs point in different directions"
    return ("faster" if above == higher_is_better else "slower"), EXCLUDES_1
