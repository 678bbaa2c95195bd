# SPDX-License-Identifier: Apache-2.0
"""How far the median of a few measurements can be trusted, whatever their distribution, and what
an interval of a ratio says.

The k-th smallest and the k-th largest of n values enclose the true median with probability
1 - 2·P(Binomial(n, 1/2) < k). Source: H. A. David and H. N. Nagaraja, Order Statistics, 3rd ed.,
section 7.1. Standard library only.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

CONFIDENCE = 0.95

Verdict = Literal["faster", "same", "ambiguous", "slower"]
COLOURS: dict[Verdict, str] = {
    "faster": "green", "same": "cyan", "ambiguous": "yellow", "slower": "red",
}  # fmt: skip


class Interval(NamedTuple):
    low: float
    high: float
    coverage: float
    """The probability with which it contains the true median."""


def median_interval(values: Sequence[float]) -> Interval:
    """The narrowest symmetric pair of order statistics that covers the median with 95 %.

    Fewer than six values do not reach that: then the extremes, with the coverage that they have.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    n, rank = len(ordered), _rank(len(ordered))
    return Interval(ordered[rank - 1], ordered[n - rank], coverage(n, rank))


@functools.cache
def _rank(n: int) -> int:
    """The largest rank whose pair of ``n`` values covers the median with ``CONFIDENCE``, or 1."""
    rank = 1
    while rank < n - rank and coverage(n, rank + 1) >= CONFIDENCE:
        rank += 1
    return rank


@functools.cache
def coverage(n: int, rank: int) -> float:
    """Probability that the ``rank``-th smallest and largest of ``n`` values enclose the median."""
    return 1 - 2 * sum(math.comb(n, i) for i in range(rank)) / 2**n if n > 1 else 0.0


def verdict(low: float, high: float, different: float, same: float) -> Verdict:
    """What the interval of a speed ratio says, above 1 for faster.

    Args:
        different: faster or slower if the whole interval is further than this from 1.
        same: else the same if the whole interval is within this of 1.
    """
    if low > 1 + different:
        return "faster"
    if high < 1 - different:
        return "slower"
    return "same" if low >= 1 - same and high <= 1 + same else "ambiguous"


def coloured(word: Verdict) -> str:
    """In the markup of Rich."""
    return f"[{COLOURS[word]}]{word}[/]"
