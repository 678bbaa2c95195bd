# SPDX-License-Identifier: Apache-2.0
"""Perplexity and the interval of a ratio, on log-probabilities that are known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workspace.eval import quality

windows = st.lists(
    st.lists(st.floats(-12.0, 0.0), min_size=1, max_size=200), min_size=1, max_size=4
)


def test_a_uniform_guess_has_the_perplexity_of_the_vocabulary() -> None:
    assert quality.perplexity([[-math.log(384)] * 9, [-math.log(384)]]) == pytest.approx(384)


@given(windows)
def test_a_model_is_as_good_as_itself(scored: list[list[float]]) -> None:
    assert quality.ratio(scored, scored) == (1.0, 1.0, 1.0)
    assert quality.mean_difference(scored, scored) == 0.0


@given(windows, st.floats(0.01, 2.0))
def test_a_loss_in_every_token_is_the_ratio_and_leaves_no_doubt(
    scored: list[list[float]], loss: float
) -> None:
    worse = [[value - loss for value in window] for window in scored]
    ratio = quality.ratio(scored, worse)
    assert ratio == pytest.approx([math.exp(loss)] * 3)
    assert ratio.value == pytest.approx(quality.perplexity(worse) / quality.perplexity(scored))
    assert quality.mean_difference(scored, worse) == pytest.approx(loss)


def test_noise_without_a_loss_has_an_interval_around_1() -> None:
    noise = [[0.5 if (i * 7 + j) % 13 < 6 else -0.5 for j in range(512)] for i in range(8)]
    mean = sum(map(sum, noise)) / 4096
    centred = [[value - mean for value in window] for window in noise]
    ratio = quality.ratio([[-3.0] * 512] * 8, [[-3.0 + x for x in window] for window in centred])
    assert ratio.value == pytest.approx(1.0)
    assert 0.9 < ratio.low < 1 < ratio.high < 1.1


def test_tokens_that_only_one_side_scored_are_no_pair() -> None:
    with pytest.raises(ValueError, match=r"cannot pair windows of \[2\] and \[1\] tokens"):
        quality.ratio([[-1.0, -1.0]], [[-1.0]])
    with pytest.raises(ValueError, match="cannot pair"):
        quality.ratio([], [])
