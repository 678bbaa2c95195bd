# SPDX-License-Identifier: Apache-2.0
"""Small matrices as pictures show what the package computes."""

from __future__ import annotations

import pytest
import torch
from custom_kernels import sparsity
from custom_kernels.bench import pictures
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


def panel() -> Axes:
    return Figure().add_subplot()


def drawn(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def test_a_matrix_has_a_cell_per_value_and_white_ones_for_zeros() -> None:
    axes = panel()
    values = torch.tensor([[0.0, 1.0, -2.0, 0.0], [3.0, 0.0, 0.0, 1e-9]])
    pictures.matrix(axes, values, group=4)
    white = [same_color(cell.get_facecolor(), pictures.EMPTY) for cell in drawn(axes)]
    assert white == (values == 0).flatten().tolist()


@pytest.mark.parametrize(("name", "k"), [("2:4", 8), ("4:6", 12), ("6:8", 16), ("8:10", 17)])
def test_the_last_line_of_an_expansion_is_the_expanded_row(name: str, k: int) -> None:
    axes = panel()
    pattern = sparsity.pattern(name)
    pictures.expansion(axes, k, pattern)
    bottom = max(cell.get_y() for cell in drawn(axes))
    places = [int(cell.get_x()) for cell in drawn(axes) if cell.get_y() == bottom]
    texts = {
        int(text.get_position()[0] - 0.5): int(text.get_text())
        for text in axes.texts
        if text.get_position()[1] == bottom + 0.5
    }
    expanded = sparsity.expand(torch.arange(1, k + 1), pattern)
    assert places == expanded.nonzero().flatten().tolist()
    assert [texts[place] for place in places] == [int(expanded[place]) - 1 for place in places]
