# SPDX-License-Identifier: Apache-2.0
"""The plots of a kernel record: how close to the roof, and how far ahead of the baseline.

The roof is that of Williams, Waterman, Patterson: Roofline (2009), with the copy bandwidth and the
matmul peaks that were measured in the same run, not those of a data sheet.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from custom_kernels.bench.record import Record, Row
from custom_kernels.command import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE_COLOUR, INK = "#7b8794", "#1f2933"
COLOURS = ("#2f6fde", "#d64545", "#2d9d78", "#b7791f", "#7c4dff", "#d4589a", "#0f8ea3", "#5f6b2d")
MARKERS = "os^Dv*XP"
FEW_OPERATIONS = 1.0
"""Per byte. Below it an operation does no more than touch what it moves; the ridge of a GPU's
roofline lies at some hundreds."""


def draw(record: Record, beside: Path) -> list[Path]:
    """Draw both plots of a record next to its file; returns their paths."""
    plots = (("roofline", roofline), ("ratio", ratios))
    paths = [(plot, beside.with_name(f"{beside.stem}-{name}.png")) for name, plot in plots]
    return [path for plot, path in paths if plot(record, path)]


def roofline(record: Record, path: Path) -> bool:
    """Operations per second over operations per byte, one point per case and contender, under the
    measured ceilings. An operation that computes next to nothing is drawn as bytes per second over
    bytes. False, and no file, if nothing was measured."""
    names = measured_names(record)
    rows = record.rows
    if not names:
        return False
    figure = _figure(8, 5.4)
    axes = figure.add_subplot()
    computes = any(row.flops > FEW_OPERATIONS * row.bytes for row in rows)
    xs: list[float] = []
    for number, name in enumerate(names):
        points = [
            (row.flops / row.bytes, timed.tflops)
            if computes
            else (row.bytes / 1e6, timed.gbytes_per_second / 1e3)
            for row in rows
            if (timed := row.timed(name))
        ]
        xs += [x for x, _ in points]
        axes.scatter(
            [x for x, _ in points],
            [y for _, y in points],
            s=22,
            color=_colour(record, names, name),
            marker=MARKERS[number % len(MARKERS)],
            alpha=0.8,
            linewidths=0,
            label=name,
            zorder=3,
        )
    copy = record.ceilings.bytes_per_second / 1e12
    low, high = min(xs) / 2, max(xs) * 2
    if computes:
        roofs(axes, record.ceilings.flops_per_second, copy, low, max(high, 2000))
        axes.set_xlabel("operations per byte that must move")
        axes.set_ylabel("TFLOP/s")
        axes.set_yscale("log")
    else:
        axes.axhline(copy, color=INK, linewidth=1.2)
        axes.text(low, copy, f"copy {copy:.2f} TB/s", va="bottom", fontsize=8, color=INK)
        axes.set_xlim(low, high)
        axes.set_ylim(0, 1.12 * copy)
        axes.set_xlabel("MB that must move")
        axes.set_ylabel("TB/s")
    axes.set_xscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="lower right")
    axes.set_title(_title(record, "how close to the limit"), fontsize=10, loc="left")
    _save(figure, path)
    return True


def roofs(axes: "Axes", peaks: dict[str, float], copy: float, low: float, high: float) -> None:
    """Draw what a device reaches at best from ``low`` to ``high`` operations per byte.

    Args:
        peaks: operations per second, by dtype; none: the slope alone.
        copy: TB/s.
    """
    flat = {name: rate / 1e12 for name, rate in peaks.items()}
    steps = [low * (high / low) ** (i / 200) for i in range(201)]
    axes.plot([], [], color=INK, linewidth=1.2, label=f"copy {copy:.2f} TB/s, matmul peak")
    for name, peak in flat.items() or {"": math.inf}.items():
        axes.plot(steps, [min(copy * x, peak) for x in steps], color=INK, linewidth=1.2, zorder=2)
        if name:
            axes.text(
                high, peak, f"{name} {peak:.0f} TFLOP/s", ha="right", va="bottom", fontsize=8,
                color=INK,
            )  # fmt: skip


def ratios(record: Record, path: Path) -> bool:
    """Baseline time / own time over M: a panel per model and pattern, a line per layer and
    contender with its 95 % interval. False, and no file, without M or without a ratio."""
    baseline = record.baseline
    names = [name for name in measured_names(record) if name != baseline]
    rows = [row for row in record.rows if "M" in row.labels]
    groups = list(dict.fromkeys(_group(row) for row in rows))
    if not names or not groups:
        return False
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    layers = list(dict.fromkeys(_layer(row) for row in rows))
    crowded = len(names) * len(layers) > 6
    figure = _figure(5.2 * columns + (2.4 if crowded else 1), 4 * lines + 0.6)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for panel in panels.flat[len(groups) :]:
        panel.set_axis_off()
    for panel, group in zip(panels.flat, groups, strict=False):
        members = [row for row in rows if _group(row) == group]
        for name in names:
            for number, layer in enumerate(layers):
                colour = COLOURS[number % len(COLOURS)] if len(names) == 1 else None
                colour = colour or _colour(record, names, name)
                line = [row for row in members if _layer(row) == layer]
                _line(panel, line, name, layer, colour, number)
        panel.axhline(1, color=INK, linewidth=0.9)
        panel.axhspan(0.98, 1.02, color="#e4e7eb", zorder=0)
        panel.set_xscale("log", base=2)
        panel.set_title(group, fontsize=10, loc="left")
        panel.set_xlabel("M (tokens)")
        panel.grid(alpha=0.3)
        if not crowded:
            panel.legend(fontsize=6.5)
    if crowded:  # too many to lie over the lines
        handles = {
            label: handle
            for panel in panels.flat
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles, fontsize=6.5, loc="outside right center")
    panels[0][0].set_ylabel(f"{baseline} time / own time (above 1: faster)")
    figure.suptitle(_title(record, "ratio to the baseline"), fontsize=11, x=0.02, ha="left")
    _save(figure, path)
    return True


def _line(
    panel: "Axes", rows: Sequence[Row], name: str, layer: str, colour: str, number: int
) -> None:
    points = [
        (int(row.labels["M"]), timed.ratio, timed.low, timed.high)
        for row in rows
        if (timed := row.timed(name)) and timed.ratio is not None
    ]
    if not points:
        return
    ms, ratios, lows, highs = zip(*sorted(points), strict=True)
    panel.plot(
        ms,
        ratios,
        marker=MARKERS[number % len(MARKERS)],
        linestyle=("-", "--", ":", "-.")[number % 4],
        markersize=3.5,
        linewidth=1,
        color=colour,
        label=f"{name} {layer}".strip(),
    )
    panel.fill_between(ms, lows, highs, color=colour, alpha=0.12)


def measured_names(record: Record) -> list[str]:
    """The contenders that have a time anywhere, the baseline first."""
    names = dict.fromkeys(name for row in record.rows for name in row.contenders)
    return [name for name in names if any(row.timed(name) for row in record.rows)]


def _layer(row: Row) -> str:
    return str(row.labels.get("layer", ""))


def _group(row: Row) -> str:
    names = (name for name in ("model", "pattern") if name in row.labels)
    return " ".join(str(row.labels[name]) for name in names) or "all"


def _colour(record: Record, names: Sequence[str], name: str) -> str:
    if name == record.baseline:
        return BASELINE_COLOUR
    others = [other for other in names if other != record.baseline]
    return COLOURS[others.index(name) % len(COLOURS)]


def _title(record: Record, what: str) -> str:
    run = record.provenance
    return f"{record.operation} {record.dtype}, {what} · {run.device} · {run.time[:10]}"


def _figure(width: float, height: float) -> "Figure":
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    write_whole(path, lambda partial: figure.savefig(partial, format=path.suffix[1:]))
