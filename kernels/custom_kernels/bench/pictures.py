# SPDX-License-Identifier: Apache-2.0
"""Small matrices as pictures: which values a pattern keeps, and where the expansion puts them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from custom_kernels import sparsity
from custom_kernels.sparsity import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, EMPTY = "#1f2933", "#ffffff"
PAIRS = ("#56b4e9", "#e69f00", "#4fc3a1", "#cc79a7", "#f0e442", "#b8c4ce")
"""The pairs of a group, in turn; colour-blind readers tell them apart (Okabe and Ito, 2008)."""


def cells(
    axes: "Axes", colours: Sequence[Sequence[str]], texts: Sequence[Sequence[str]], group: int = 0
) -> None:
    """Draw a cell per colour, row by row from the top, with its text in it.

    Args:
        colours: [rows][columns]; an empty string leaves the place free.
        texts: the same shape.
        group: draw a stronger line after every so many columns.
    """
    from matplotlib.patches import Rectangle

    for row, (line, words) in enumerate(zip(colours, texts, strict=True)):
        for column, (colour, text) in enumerate(zip(line, words, strict=True)):
            if not colour:
                continue
            axes.add_patch(
                Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="#9aa5b1", linewidth=0.6)
            )
            axes.text(
                column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, color=INK
            )
    columns = max(map(len, colours))
    for place in range(0, columns + 1, group) if group else ():
        axes.axvline(place, color=INK, linewidth=1.4)
    axes.set_xlim(0, columns)
    axes.set_ylim(len(colours), 0)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def matrix(axes: "Axes", values: torch.Tensor, group: int = 0) -> None:
    """A matrix [rows, columns]: zeros are white, the others the darker the larger they are."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    sizes = values.double().abs()
    shades = (0.15 + 0.55 * sizes / sizes.max().clamp(min=1e-30)).tolist()
    kept = (sizes > 0).tolist()
    shade = colormaps["Blues"]
    colours = [
        [to_hex(shade(value)) if there else EMPTY for value, there in zip(line, known, strict=True)]
        for line, known in zip(shades, kept, strict=True)
    ]
    cells(axes, colours, [[""] * len(line) for line in colours], group)


def expansion(axes: "Axes", k: int, pattern: Pattern) -> None:
    """A row of ``k`` values, the windows of its groups, a line each, and the expanded row as
    ``sparsity.expand`` lays it out, each value with its index and the colour of its pair. The
    zeros behind the last value are left out."""
    order = sparsity.expand(torch.arange(1, k + 1), pattern)
    length = int(order.nonzero().max()) + 1
    row = list(range(k))
    lines = [row]
    for window in range(pattern.n - 1):
        start = [2 * window <= index % pattern.group < 2 * window + 4 for index in row]
        lines.append([index if inside else -1 for index, inside in zip(row, start, strict=True)])
    lines += [[], [index - 1 for index in order[:length].tolist()]]
    width = max(k, length)
    padded = [line + [-1] * (width - len(line)) for line in lines]
    colours = [
        [PAIRS[index % pattern.group // 2 % len(PAIRS)] if index >= 0 else "" for index in line]
        for line in padded
    ]
    cells(axes, colours, [[str(index) if index >= 0 else "" for index in line] for line in padded])
    names = ["x", *(f"window {j}" for j in range(pattern.n - 1)), "", "expanded"]
    axes.set_yticks([place + 0.5 for place in range(len(names))], names, fontsize=8)
    axes.tick_params(length=0)
    odd = pattern.odd_start(k)
    if pattern.odd:
        axes.axvline(odd, 1 / len(lines), 0, color=INK, linewidth=2)
        axes.text(odd, len(lines) - 1.1, "odd section", fontsize=8, va="bottom")
    axes.text(0, len(lines) - 1.1, "even section", fontsize=8, va="bottom")
