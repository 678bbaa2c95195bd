# SPDX-License-Identifier: Apache-2.0
"""Sectors and bank conflicts of well-known access patterns."""

from __future__ import annotations

import pytest
from custom_kernels.inspect import access

LANES = range(32)


@pytest.mark.parametrize(
    ("stride", "width", "expected"),
    [(4, 4, 4), (2, 2, 2), (16, 16, 16), (0, 4, 1), (7168, 2, 32), (32, 4, 32)],
)
def test_sectors_of_a_warp(stride: int, width: int, expected: int) -> None:
    assert access.sectors([lane * stride for lane in LANES], width) == expected


def test_an_access_across_a_border_touches_both_sectors() -> None:
    assert access.sectors([30], 4) == 2


@pytest.mark.parametrize(
    ("stride", "width", "expected"),
    [
        (4, 4, 1),  # neighbours
        (0, 4, 1),  # one word for all
        (2, 2, 1),  # two lanes share a word
        (8, 4, 2),  # every second bank
        (128, 4, 32),  # a column of a tile of 32 floats
        (132, 4, 1),  # the same, padded by one
        (16, 16, 4),  # the fewest for 512 bytes
        (128, 16, 32),  # 16 bytes from rows of 128
        (144, 16, 4),  # the same, padded by 16 bytes
    ],
)
def test_passes_through_shared_memory(stride: int, width: int, expected: int) -> None:
    assert access.passes([lane * stride for lane in LANES], width) == expected


def test_a_bank_is_four_bytes_wide() -> None:
    assert [access.bank(address) for address in (0, 3, 4, 127, 128)] == [0, 0, 1, 31, 0]


def test_a_width_that_no_instruction_has_is_an_error() -> None:
    with pytest.raises(ValueError, match="not 3"):
        access.passes([0], 3)
