# SPDX-License-Identifier: Apache-2.0
"""The window expansion: its layout, and that every row of the pattern can be cut into 2:4
windows."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from custom_kernels.sparsity import ROW_MULTIPLE, SECTION_MULTIPLE, Pattern, expand, pattern
from hypothesis import given, settings
from hypothesis import strategies as st

PATTERNS = st.integers(2, 16).map(Pattern)
LENGTHS = st.one_of(st.integers(1, 200), st.sampled_from([3584, 4864, 18944]))


def sources(form: Pattern, k: int) -> list[int]:
    """What stands at each place of the expanded row: a value's index, or -1 for padding."""
    # Found by expanding the indices themselves, from 1 so that padding is told from value 0.
    return (expand(torch.arange(1, k + 1), form) - 1).tolist()


@settings(max_examples=60, deadline=None)
@given(form=PATTERNS, k=LENGTHS)
def test_each_section_is_the_documented_run_of_every_group(form: Pattern, k: int) -> None:
    found = sources(form, k)
    even: list[int] = []
    odd: list[int] = []
    for start in range(0, k, form.group):
        group = [i if i < k else -1 for i in range(start, start + form.group)]
        even += group[: 4 * -(-(form.n - 1) // 2)]
        odd += group[2 : 2 + 4 * ((form.n - 1) // 2)]
    start = form.odd_start(k)
    assert found[: len(even)] == even
    assert found[start : start + len(odd)] == odd
    padding = found[len(even) : start] + found[start + len(odd) :]
    assert set(padding) <= {-1}


@settings(max_examples=60, deadline=None)
@given(form=PATTERNS, k=LENGTHS)
def test_every_aligned_quad_is_a_window_of_two_neighbouring_pairs(form: Pattern, k: int) -> None:
    found = sources(form, k)
    windows = set()
    for quad in zip(*[iter(found)] * 4, strict=True):
        first = quad[0]
        if first < 0:
            assert quad == (-1, -1, -1, -1)
            continue
        assert first % 2 == 0
        assert first % form.group <= form.group - 4
        assert list(quad) == [i if i < k else -1 for i in range(first, first + 4)]
        assert first not in windows
        windows.add(first)
    wanted = {
        group + 2 * j for group in range(0, k, form.group) for j in range(form.n - 1)
    }  # of a group that is not full, those that hold a value
    assert windows == {first for first in wanted if first < k}


@settings(max_examples=100, deadline=None)
@given(form=PATTERNS, k=LENGTHS)
def test_sections_are_aligned_and_no_longer_than_needed(form: Pattern, k: int) -> None:
    start, end = form.odd_start(k), form.expanded(k)
    assert start % SECTION_MULTIPLE == 0
    assert end % ROW_MULTIPLE == 0
    needed = form.groups(k) * (form.n - 1) * 4
    assert needed <= end < needed + 2 * SECTION_MULTIPLE + ROW_MULTIPLE
    assert form.even + form.odd == 4 * (form.n - 1)


def test_the_plain_row_is_the_even_section_where_n_is_even() -> None:
    for form in (Pattern(2), Pattern(4), Pattern(16)):
        k = 5 * form.group
        assert sources(form, k)[:k] == list(range(k))
    assert Pattern(2).odd == 0


def windows_of(mask: list[bool]) -> list[list[int]] | None:
    """Share the nonzeros of a group out to its windows, at most two each; None if it fails.

    Greedy from the left: what a pair has goes to the window that ends with it while that has room.
    """
    pairs = [[i for i in (2 * p, 2 * p + 1) if mask[i]] for p in range(len(mask) // 2)]
    windows: list[list[int]] = [[] for _ in range(len(pairs) - 1)]
    for p, items in enumerate(pairs):
        for item in items:
            for window in (p - 1, p):
                if 0 <= window < len(windows) and len(windows[window]) < 2:
                    windows[window].append(item)
                    break
            else:
                return None
    return windows


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_mask_of_the_pattern_can_be_shared_out_to_2_4_windows(n: int) -> None:
    form = Pattern(n)
    for bits in itertools.product([False, True], repeat=form.group):
        if sum(bits) <= form.nonzeros:
            assert windows_of(list(bits)) is not None, bits


@settings(max_examples=200, deadline=None)
@given(form=PATTERNS, seed=st.integers(0, 2**32))
def test_full_masks_of_any_pattern_can_be_shared_out(form: Pattern, seed: int) -> None:
    chosen = random.Random(seed).sample(range(form.group), form.nonzeros)
    windows = windows_of([i in chosen for i in range(form.group)])
    assert windows is not None
    assert sorted(itertools.chain(*windows)) == sorted(chosen)


@settings(max_examples=40, deadline=None)
@given(form=PATTERNS, k=st.integers(1, 150), seed=st.integers(0, 2**32))
def test_a_product_over_the_expanded_row_is_the_product(form: Pattern, k: int, seed: int) -> None:
    """With weights put into the windows that `windows_of` gives their nonzeros to."""
    rng = random.Random(seed)
    weight = torch.zeros(form.groups(k) * form.group, dtype=torch.int64)
    found = sources(form, k)
    packed = torch.zeros(len(found), dtype=torch.int64)
    window_at = {first: 4 * i for i, first in enumerate(found[::4]) if first >= 0}
    for start in range(0, k, form.group):
        size = min(form.group, k - start)
        chosen = rng.sample(range(size), min(size, form.nonzeros))
        windows = windows_of([i in chosen for i in range(form.group)])
        assert windows is not None
        for j, items in enumerate(windows):
            for item in items:
                weight[start + item] = value = rng.randint(-9, 9)
                packed[window_at[start + 2 * j] + item - 2 * j] = value
    assert all((packed.view(-1, 4) != 0).sum(1) <= 2)
    x = torch.randint(-9, 10, (3, k))
    assert torch.equal(expand(x, form) @ packed, x @ weight[:k])


def test_expand_keeps_leading_dimensions_and_any_dtype() -> None:
    x = torch.arange(2 * 3 * 10).view(2, 3, 10)
    wide = expand(x, Pattern(4))
    assert wide.shape == (2, 3, 64)
    for dtype in (torch.int8, torch.bfloat16, torch.float8_e4m3fn, torch.float64):
        assert torch.equal(expand(x.to(dtype), Pattern(4)).double(), wide.to(dtype).double())
    assert expand(x, None).shape == (2, 3, 16)
    assert expand(x[:0], Pattern(3)).shape == (0, 3, 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("6", "'6' is not a pattern; write 2:4"),
        ("a:b", "'a:b' is not a pattern"),
        ("5:8", r"5:8 is not a pattern \(2N-2\):2N"),
        ("5:7", "5:7 is not a pattern"),
        ("0:2", "N from 2"),
        ("32:34", "N from 2"),
    ],
)
def test_a_name_that_is_no_pattern_is_one_clear_error(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pattern(name)
    assert "\n" not in str(caught.value)


def test_a_pattern_reads_as_it_is_written() -> None:
    for name in ("2:4", "4:6", "6:8", "8:10", "30:32"):
        assert str(pattern(name)) == name
