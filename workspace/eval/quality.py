# SPDX-License-Identifier: Apache-2.0
"""Perplexity, and the ratio of two of them with its interval.

    perplexity = exp(-mean log p(token | tokens before it in its window))

Both sides score the same tokens, so the logarithm of their ratio is the mean of the differences
token by token. Neighbours are alike, so whole blocks of tokens are resampled (block bootstrap;
H. R. Künsch, The jackknife and the bootstrap for general stationary observations, 1989).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

BLOCK = 64
"""Tokens of a block; none goes over the end of a window."""
RESAMPLES = 2000
SEED = 1
CONFIDENCE = 0.95

Scored = Sequence[Sequence[float]]
"""Log-probabilities, window by window."""


class Ratio(NamedTuple):
    value: float
    low: float
    high: float
    """The ends of its interval of 95 %."""


def nats(logprobs: Scored) -> float:
    """Mean of -log p of a token."""
    values = [value for window in logprobs for value in window]
    return -math.fsum(values) / len(values)


def perplexity(logprobs: Scored) -> float:
    return math.exp(nats(logprobs))


def ratio(baseline: Scored, candidate: Scored) -> Ratio:
    """Perplexity of the candidate over that of the baseline.

    Raises:
        ValueError: they did not score the same tokens, or none.
    """
    import numpy as np

    shapes = [[len(window) for window in side] for side in (baseline, candidate)]
    if shapes[0] != shapes[1] or not sum(shapes[0]):
        raise ValueError(f"cannot pair windows of {shapes[0]} and {shapes[1]} tokens")
    blocks = [
        (sum(losses[start : start + BLOCK]), len(losses[start : start + BLOCK]))
        for old, new in zip(baseline, candidate, strict=True)
        for losses in [[a - b for a, b in zip(old, new, strict=True)]]
        for start in range(0, len(losses), BLOCK)
    ]
    sums, counts = np.array(blocks).T
    drawn = np.random.default_rng(SEED).integers(len(blocks), size=(RESAMPLES, len(blocks)))
    tail = (1 - CONFIDENCE) / 2
    with np.errstate(invalid="ignore"):  # what is not finite makes the run invalid
        means = sums[drawn].sum(1) / counts[drawn].sum(1)
        low, high = np.quantile(means, [tail, 1 - tail])
    return Ratio(*(float(np.exp(x)) for x in (sums.sum() / counts.sum(), low, high)))


def mean_difference(baseline: Scored, candidate: Scored) -> float:
    """Mean absolute difference of the log-probabilities of a token, in nats."""
    pairs = zip(baseline, candidate, strict=True)
    differences = [abs(a - b) for old, new in pairs for a, b in zip(old, new, strict=True)]
    return math.fsum(differences) / len(differences)
