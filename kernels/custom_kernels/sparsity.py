# SPDX-License-Identifier: Apache-2.0
"""(2N-2):2N sparsity on tensor cores that know 2:4 only: the window expansion and its layout.

A row of weights with at most 2N-2 nonzeros in every 2N consecutive values is cut into groups of 2N
values = N pairs. Window j (0 <= j <= N-2) holds the pairs j and j+1; windows overlap by a pair, so
the nonzeros of a group can be shared out such that no window holds more than two: each window is
2:4. The activation is expanded alike: the inner pairs of a group are there twice. A product over
the expanded K then equals the product over K exactly. Expanded K is K · (N-1)·4 / 2N.

Weight and activation may be expanded in any order, as long as it is the same. Here it is two
sections, so that a kernel loads and stores long contiguous runs without a gather:

- the **even** section: of every group in turn the windows 0, 2, ..., which is the run of values
  ``[0, 4·ceil((N-1)/2))`` of the group. Where N is even this is the plain row.
- the **odd** section: of every group in turn the windows 1, 3, ..., which is the run of values
  ``[2, 2 + 4·floor((N-1)/2))`` of the group. 2:4 has none.

Each section is padded with zeros to a multiple of 16 values, the whole to a multiple of 64; K that
is not a multiple of the group counts as padded with zeros.

A **mixed** weight is half 2:4 and half dense: of every 128 rows at most 64, in aligned groups of 8,
are not 2:4. A quarter of its values is zero, as in 6:8, but nothing is expanded: the activation is
that of 2:4, the plain row, by which the dense rows are multiplied, too.

Sources: the sliding-window decomposition of (2N-2):2N patterns, SlideSparse (arXiv 2603.05232);
rows of both kinds in one product, arXiv 2606.10445.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

SECTION_MULTIPLE = 16
"""Values: 16 bytes of a quantized row, so that either section starts where a wide store may."""
ROW_MULTIPLE = 64
"""Values: what one sparse 8-bit tensor-core instruction takes along K."""

MIXED = "mixed"
MIXED_ROWS = 128
"""Rows of a mixed weight of which at most half are dense."""
MIXED_GROUP = 8
"""Neighbouring rows that are all 2:4 or all dense: 16 bytes of an output row in bfloat16."""


@dataclass(frozen=True)
class Pattern:
    """At most 2N-2 nonzeros in every 2N consecutive values; ``Pattern(2)`` is 2:4.

    ``Pattern(2, mixed=True)`` asks that of half of the rows.
    """

    n: int
    mixed: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.n <= 16:
            raise ValueError(
                f"a pattern (2N-2):2N needs N from 2 (2:4) to 16 (30:32), got N={self.n}"
            )

    def __str__(self) -> str:
        return MIXED if self.mixed else self.expansion

    @property
    def expansion(self) -> str:
        """Name of the pattern that activations are expanded for."""
        return f"{2 * self.n - 2}:{2 * self.n}"

    @property
    def group(self) -> int:
        """Values in a group, 2N."""
        return 2 * self.n

    @property
    def nonzeros(self) -> int:
        """How many of them may be nonzero, 2N-2."""
        return 2 * self.n - 2

    @property
    def even(self) -> int:
        """Length of a group's run in the even section; it starts at the group's value 0."""
        return 4 * (self.n // 2)

    @property
    def odd(self) -> int:
        """Length of a group's run in the odd section; it starts at the group's value 2."""
        return 4 * ((self.n - 1) // 2)

    def groups(self, k: int) -> int:
        """Groups in a row of ``k`` values, the last one perhaps not full."""
        return -(-k // self.group)

    def odd_start(self, k: int) -> int:
        """Where the odd section starts in the expanded row of ``k`` values."""
        return _up(self.groups(k) * self.even, SECTION_MULTIPLE)

    def expanded(self, k: int) -> int:
        """Length of the expanded row of ``k`` values, padding included."""
        odd = _up(self.groups(k) * self.odd, SECTION_MULTIPLE)
        return _up(self.odd_start(k) + odd, ROW_MULTIPLE)


def pattern(name: str) -> Pattern:
    """``"6:8"`` or ``"mixed"`` as a Pattern. Raises ValueError, with examples, for any other."""
    if name == MIXED:
        return Pattern(2, mixed=True)
    nonzeros, _, group = name.partition(":")
    if not (nonzeros.isdecimal() and group.isdecimal()):
        raise ValueError(f"{name!r} is not a pattern; write 2:4, 4:6, 6:8, 8:10, ... or mixed")
    if int(group) % 2 or int(nonzeros) != int(group) - 2:
        raise ValueError(
            f"{name} is not a pattern (2N-2):2N that expands to 2:4, like 2:4, 4:6, 6:8, 8:10, ..."
        )
    return Pattern(int(group) // 2)


def expand(values: torch.Tensor, pattern: Pattern | None) -> torch.Tensor:
    """[..., K] of any dtype into [..., K']: the even section, the odd section, and zeros.

    Without a pattern the row is only padded with zeros to a multiple of 16.
    """
    k = values.shape[-1]
    if pattern is None:
        return pad(values, (0, -k % SECTION_MULTIPLE))
    count = pattern.groups(k)
    groups = pad(values, (0, count * pattern.group - k)).unflatten(-1, (count, pattern.group))
    out = values.new_zeros((*values.shape[:-1], pattern.expanded(k)))
    even, odd = count * pattern.even, count * pattern.odd
    out[..., :even] = groups[..., : pattern.even].flatten(-2)
    start = pattern.odd_start(k)
    out[..., start : start + odd] = groups[..., 2 : 2 + pattern.odd].flatten(-2)
    return out


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
