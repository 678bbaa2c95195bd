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


# Student's t, 97.5 %, of 1 to 30 degrees of freedom. Source: NIST/SEMATECH e-Handbook of
# Statistical Methods, table 1.3.6.7.2.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def student(freedom: int) -> float:
    """How many standard errors around a mean of normal values contain it with ``CONFIDENCE``, if
    the error was estimated with ``freedom`` degrees of freedom."""
    return _STUDENT[min(freedom, len(_STUDENT)) - 1]


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
