# SPDX-License-Identifier: Apache-2.0
"""The statistics: intervals that cover, verdicts that say "ambiguous" when it is."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workspace.bench.compare import SAME_WITHIN, compare

figures = st.floats(min_value=1e-3, max_value=1e6)
sides = st.integers(1, 4).flatmap(
    lambda pairs: st.integers(1, 6).flatmap(
        lambda rounds: st.lists(
            st.lists(figures, min_size=rounds, max_size=rounds), min_size=pairs, max_size=pairs
        )
    )
)


@settings(deadline=None)  # a shared machine stalls at times
@given(sides, st.booleans())
def test_a_side_against_itself_has_ratio_one(side: list[list[float]], higher: bool) -> None:
    result = compare(side, side, higher)
    assert result.ratio == 1.0
    low, high = result.interval
    assert low <= 1.0 <= high
    alike = compare([side[0]] * 2, [side[0]] * 2, higher)
    assert alike.interval == (1.0, 1.0)
    assert alike.verdict == "same"


@settings(deadline=None)  # a shared machine stalls at times
@given(sides, st.floats(0.01, 100.0), st.booleans())
def test_a_factor_on_every_round_is_the_ratio(
    side: list[list[float]], factor: float, higher: bool
) -> None:
    scaled = [[value * factor for value in rounds] for rounds in side]
    assert compare(side, scaled, higher).ratio == pytest.approx(factor)


@settings(deadline=None)  # a shared machine stalls at times
@given(sides, st.data())
def test_more_tokens_per_second_and_fewer_seconds_are_the_same_verdict(
    one: list[list[float]], data: st.DataObject
) -> None:
    factors = st.floats(0.5, 2.0)
    other = [[value * data.draw(factors) for value in rounds] for rounds in one]
    rates = compare(one, other, higher_is_better=True)
    seconds = [[[1 / value for value in rounds] for rounds in side] for side in (one, other)]
    times = compare(*seconds, higher_is_better=False)
    # 1.02 and 1 / 1.02 are not equally far from 1; stay away from that edge.
    if all(abs(end - 1) > 2 * SAME_WITHIN for end in rates.interval):
        assert rates.verdict == times.verdict


@pytest.mark.parametrize(
    ("baseline", "candidate", "higher", "verdict"),
    [
        ([[100] * 5] * 2, [[110] * 5] * 2, True, "faster"),
        ([[100] * 5] * 2, [[110] * 5] * 2, False, "slower"),
        ([[100] * 5] * 2, [[90] * 5] * 2, True, "slower"),
        ([[100] * 5] * 2, [[101] * 5] * 2, True, "same"),
        ([[100] * 5] * 2, [[90, 95, 100, 105, 110], [92, 97, 103, 108, 111]], True, "ambiguous"),
        # Each pair is sure of itself, but they contradict one another.
        ([[100] * 5] * 2, [[130] * 5, [70] * 5], True, "ambiguous"),
        ([[100] * 10], [[200] * 10], True, "ambiguous"),
        # Another program ran during the first half: rounds differ more than the variants do.
        ([[100] * 5, [10] * 5], [[70] * 5, [6] * 5], True, "ambiguous"),
        ([[100, 101, 99, 100, 100]] * 2, [[95, 96, 94, 95, 95]] * 2, True, "slower"),
        # Rounds of a process are alike, processes are not: 4 % are no more than those differ by.
        ([[100] * 20, [102] * 20], [[96] * 20, [98] * 20], False, "ambiguous"),
        ([[100] * 20, [100.2] * 20], [[96] * 20, [96.2] * 20], False, "faster"),
    ],
)
def test_verdict(
    baseline: list[list[float]], candidate: list[list[float]], higher: bool, verdict: str
) -> None:
    assert compare(baseline, candidate, higher).verdict == verdict


def processes(draw: random.Random, pairs: int, apart: float, shift: float) -> list[list[float]]:
    """Processes that are `apart` (a standard deviation), with five rounds that are 1 % apart."""
    means = [draw.gauss(shift, apart) for _ in range(pairs)]
    return [[math.exp(draw.gauss(mean, 0.01)) for _ in range(5)] for mean in means]


@pytest.mark.parametrize("pairs", [2, 4])
@pytest.mark.parametrize("apart", [0, 0.01, 0.05])
def test_intervals_cover_and_verdicts_are_true_however_far_processes_are_apart(
    pairs: int, apart: float
) -> None:
    draw = random.Random(pairs)
    runs, covered, false = 600, 0, 0
    for _ in range(runs):
        stock = processes(draw, pairs, apart, 0.0)
        covers = compare(stock, processes(draw, pairs, apart, 0.1), True).interval
        covered += math.log(covers[0]) <= 0.1 <= math.log(covers[1])
        again = compare(stock, processes(draw, pairs, apart, 0.0), True)
        false += again.verdict in ("faster", "slower")
    # 95 % within three standard errors of 600 runs; false verdicts: 2 of 50 would be too many.
    assert covered / runs > 0.92
    assert false / runs < 0.04


@pytest.mark.parametrize(
    ("baseline", "candidate"),
    [
        ([], []),
        ([[]], [[]]),
        ([[1.0]], [[1.0, 2.0]]),
        ([[1.0]], [[0.0]]),
        ([[1.0]], [[float("nan")]]),
    ],
)
def test_figures_that_cannot_be_paired_are_refused(
    baseline: list[list[float]], candidate: list[list[float]]
) -> None:
    with pytest.raises(ValueError, match=r"pair rounds|not positive"):
        compare(baseline, candidate, higher_is_better=True)
