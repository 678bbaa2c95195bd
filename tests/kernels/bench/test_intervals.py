# SPDX-License-Identifier: Apache-2.0
"""Intervals that cover the true median as often as they say."""

from __future__ import annotations

import random
import statistics

import pytest
from custom_kernels.bench.intervals import CONFIDENCE, coverage, median_interval
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None)  # a shared machine stalls at times
@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=60))
def test_it_holds_the_median_and_its_ends_are_measured_values(values: list[float]) -> None:
    low, high, covered = median_interval(values)
    assert low <= statistics.median(values) <= high
    assert {low, high} <= set(values)
    assert 0 <= covered < 1


def test_six_values_are_the_fewest_with_a_95_percent_interval() -> None:
    assert median_interval(range(1, 6)).coverage < CONFIDENCE
    assert median_interval(range(1, 7)) == (1, 6, pytest.approx(1 - 2 / 64))


def test_ten_values_drop_one_extreme_on_each_side() -> None:
    assert median_interval(range(1, 11)) == (2, 9, pytest.approx(1 - 2 * 11 / 1024))


@pytest.mark.parametrize("size", [6, 9, 10, 20, 60, 300])
def test_it_covers_the_true_median_as_often_as_it_says(size: int) -> None:
    draw = random.Random(size)
    found = [median_interval([draw.lognormvariate(0, 1) for _ in range(size)]) for _ in range(2000)]
    hits = sum(low <= 1 <= high for low, high, _ in found)
    assert hits / 2000 == pytest.approx(found[0].coverage, abs=0.015)
    assert hits / 2000 > 0.935  # 0.95 less four standard errors
    assert found[0].coverage >= CONFIDENCE


@pytest.mark.parametrize("size", [6, 9, 20, 60, 300])
def test_it_is_no_wider_than_it_must_be(size: int) -> None:
    # The next pair of values inward would not do.
    rank = next(r for r in range(1, size) if coverage(size, r + 1) < CONFIDENCE)
    ordered = list(map(float, range(size)))
    assert median_interval(ordered)[:2] == (ordered[rank - 1], ordered[size - rank])


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        median_interval([])
