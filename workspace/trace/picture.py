# SPDX-License-Identifier: Apache-2.0
"""The picture of a trace: each phase of each variant as a bar, cut into what a step consists of."""

from __future__ import annotations

import io
from pathlib import Path

from custom_kernels.bench.plots import INK

from workspace.host.files import write_file
from workspace.trace.record import Record

LABELLED = 0.05
"""Share of the longest bar of its phase from which on a piece has its share written in it."""
NAMED = 0.01
"""Share of a step from which on a part is in the legend; the others are one piece."""
OTHERS, OTHERS_COLOUR = "others", "#f2f2f2"
GAPS, GAPS_COLOUR = "gaps", "#d0d0d0"


def draw(record: Record, path: Path) -> None:
    """Draw it as a PNG at `path`; one row of bars for each phase, each with its own scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(one.phase for side in record.sides for one in side.phases))
    every = [one for side in record.sides for one in side.phases]
    parts = dict.fromkeys(
        p for one in every for p, us in one.parts().items() if us >= NAMED * one.us
    )
    palette = matplotlib.colormaps["tab20"]
    colours = {part: to_hex(palette(n % palette.N)) for n, part in enumerate(parts)}
    colours |= {OTHERS: OTHERS_COLOUR, GAPS: GAPS_COLOUR}
    height = 1.0 + len(names) * (0.9 + 0.55 * len(record.sides))
    size = (11, max(height, 0.8 + 0.2 * len(colours)))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        phases = [(s.name, one) for s in record.sides for one in s.phases if one.phase == name]
        longest = max(one.us for _, one in phases)
        for place, (_, one) in enumerate(phases):
            of = one.parts()
            small = sum(us for part, us in of.items() if part not in parts)
            left = 0.0
            # The same order in every bar, so that they can be compared.
            pieces = [(part, of.get(part, 0.0)) for part in parts]
            for part, us in [*pieces, (OTHERS, small), (GAPS, one.gaps_us)]:
                colour = colours[part]
                axes.barh(place, us / 1e3, left=left / 1e3, color=colour, edgecolor="white")
                if us >= LABELLED * longest:
                    middle = (left + us / 2) / 1e3
                    text = f"{us / one.us:.0%}"
                    axes.text(middle, place, text, ha="center", va="center", fontsize=7)
                left += us
        axes.set_yticks(range(len(phases)), [side for side, _ in phases])
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        first = phases[0][1]
        title = f"{name}: {first.tokens:,.0f} tokens of {first.requests:,.0f} requests"
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        axes.set_xlabel("ms a step", fontsize=8)
    handles = [Patch(color=colour, label=part) for part, colour in colours.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=7, frameon=False)
    figure.suptitle(
        f"{record.model.name}, {record.device}, {'eager' if record.eager else 'compiled'}",
        x=0.01, ha="left", fontweight="bold", color=INK,
    )  # fmt: skip
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_file(path, drawn.getvalue())
