# SPDX-License-Identifier: Apache-2.0
"""The plots of a kernel record: how close to the roof, and how far ahead of the baseline.

The roof is that of Williams, Waterman, Patterson: Roofline (2009), with the copy bandwidth and the
matmul peaks that were measured in the same run, not those of a data sheet.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from custom_kernels.bench.record import Record, Row, Timed
from custom_kernels.command import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE_COLOUR, INK = "#6f6f74", "#1f2933"
COLOURS = ("#2d87c3", "#e16900", "#871eff", "#789669", "#d2002d", "#8778ff")
"""3:1 against white and against a dark page. Any two of these seven are 24 apart in CIELAB at least
as red-green blind readers see them (Machado, Oliveira, Fernandes, 2009), 15 with tritanopia."""
MARKERS = "os^Dv*XP"
FEW_OPERATIONS = 1.0
"""Per byte. Below it an operation does no more than touch what it moves; the ridge of a GPU's
roofline lies at some hundreds."""


def draw(record: Record, beside: Path) -> list[Path]:
    """Draw both plots of a record next to its file; returns their paths."""
    plots = (("roofline", roofline), ("ratio", ratios))
    paths = [(plot, beside.with_name(f"{beside.stem}-{name}.png")) for name, plot in plots]
    return [path for plot, path in paths if plot(record, path)]


class Mark(NamedTuple):
    """A measurement on a roofline."""

    name: str
    row: Row
    timed: Timed
    x: float
    """Operations per byte that must move, or megabytes."""
    y: float
    """TFLOP/s, or TB/s."""


def computes(record: Record) -> bool:
    """Whether its rooflines are of operations; those of what computes next to nothing are drawn as
    bytes per second over bytes."""
    return any(row.flops > FEW_OPERATIONS * row.bytes for row in record.rows)


def marks(record: Record) -> list[Mark]:
    """Every measurement, by contender, the baseline first."""
    operations = computes(record)
    return [
        Mark(name, row, timed, row.flops / row.bytes, timed.tflops)
        if operations
        else Mark(name, row, timed, row.bytes / 1e6, timed.gbytes_per_second / 1e3)
        for name in measured_names(record)
        for row in record.rows
        if (timed := row.timed(name))
    ]


def roofline(record: Record, path: Path) -> bool:
    """One point per case and contender, under the ceilings measured in the same run. False, and no
    file, if nothing was measured."""
    drawn = marks(record)
    if not drawn:
        return False
    figure = _figure(8, 5.4)
    axes = figure.add_subplot()
    names = measured_names(record)
    for number, name in enumerate(names):
        axes.scatter(
            [mark.x for mark in drawn if mark.name == name],
            [mark.y for mark in drawn if mark.name == name],
            s=22,
            color=_colour(record, names, name),
            marker=MARKERS[number % len(MARKERS)],
            alpha=0.8,
            linewidths=0,
            label=name,
            zorder=3,
        )
    copy = record.ceilings.bytes_per_second / 1e12
    low, high = min(mark.x for mark in drawn) / 2, max(mark.x for mark in drawn) * 2
    if computes(record):
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


def roof(copy: float, peak: float, low: float, high: float) -> list[tuple[float, float]]:
    """What a device reaches at best from ``low`` to ``high`` operations per byte: the corners.

    Args:
        copy: TB/s.
        peak: TFLOP/s; infinite: the slope alone.
    """
    ridge = min(max(peak / copy, low), high)
    return [(x, min(copy * x, peak)) for x in (low, ridge, high)]


def roofs(axes: "Axes", peaks: dict[str, float], copy: float, low: float, high: float) -> None:
    """Draw a roof per dtype on logarithmic axes.

    Args:
        peaks: operations per second, by dtype; none: the slope alone.
        copy: TB/s.
    """
    flat = {name: rate / 1e12 for name, rate in peaks.items()}
    label = f"copy {copy:.2f} TB/s, matmul peak"
    for name, peak in flat.items() or {"": math.inf}.items():
        xs, ys = zip(*roof(copy, peak, low, high), strict=True)
        axes.plot(xs, ys, color=INK, linewidth=1.2, zorder=2, label=label)
        label = "_"  # matplotlib leaves it out of the legend
        if name:
            axes.text(
                xs[1], peak, f"{name} {peak:.0f} TFLOP/s", ha="right", va="bottom", fontsize=8,
                color=INK,
            )  # fmt: skip


def ratios(record: Record, path: Path) -> bool:
    """Baseline time / own time over M: a row of panels per model and pattern, a column per layer, a
    line per contender with its 95 % interval. False, and no file, without M or without a ratio."""
    names = [name for name in measured_names(record) if name != record.baseline]
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in record.rows:
        if "M" in row.labels:
            panels.setdefault((_group(row), str(row.labels.get("layer", ""))), []).append(row)
    if not names or not panels:
        return False
    groups, layers = (list(dict.fromkeys(keys)) for keys in zip(*panels, strict=True))
    figure = _figure(2 * len(layers) + 1.4, 1.55 * len(groups) + 0.8)
    grid = figure.subplots(len(groups), len(layers), sharex=True, sharey=True, squeeze=False)
    for line, group in zip(grid, groups, strict=True):
        ends: dict[str, float] = {}
        for axes, layer in zip(line, layers, strict=True):
            for name in names:
                points = _points(panels.get((group, layer), []), name)
                if points:
                    _line(axes, points, _colour(record, names, name), names.index(name))
                    ends[name] = points[-1][1]
            axes.axhline(1, color=INK, linewidth=0.9)
            axes.axhspan(0.98, 1.02, color="#e4e7eb", zorder=0)
            axes.set_title(f"{group} {layer}".strip(), fontsize=8, loc="left")
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=7)
        _name_lines(line[-1], ends, record, names)
    sizes = sorted({int(row.labels["M"]) for rows in panels.values() for row in rows})
    axes = grid[0][0]
    axes.set_xscale("log", base=2)
    shown = sizes[:: -(-len(sizes) // 5)]
    ticks = [f"{size >> 10}k" if size % 1024 == 0 else str(size) for size in shown]
    axes.set_xticks(shown, ticks)
    axes.minorticks_off()
    figure.supxlabel("M (tokens)", fontsize=8)
    figure.supylabel(f"{record.baseline} time / own time (above 1: faster)", fontsize=8)
    figure.suptitle(_title(record, "ratio to the baseline"), fontsize=10, x=0.02, ha="left")
    _save(figure, path)
    return True


Point = tuple[int, float, float, float]
"""M, ratio, both ends of its interval."""


def _points(rows: Sequence[Row], name: str) -> list[Point]:
    return sorted(
        (int(row.labels["M"]), *found)
        for row in rows
        if (timed := row.timed(name)) and (found := timed.comparison)
    )


def _line(axes: "Axes", points: Sequence[Point], colour: str, number: int) -> None:
    ms, ratios, lows, highs = zip(*points, strict=True)
    marker = MARKERS[1 + number % (len(MARKERS) - 1)]
    axes.plot(ms, ratios, marker=marker, markersize=3.5, linewidth=1.2, color=colour)
    axes.fill_between(ms, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _name_lines(axes: "Axes", ends: dict[str, float], record: Record, names: Sequence[str]) -> None:
    """Write each contender's name beside the end of its line, moved up where two would overlap."""
    low, high = axes.get_ylim()
    above = -math.inf
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        above = max((end - low) / (high - low), above + 0.13)
        axes.annotate(
            name, (1.03, above), xycoords="axes fraction", va="center", fontsize=8,
            annotation_clip=False, color=_colour(record, names, name),
        )  # fmt: skip


def measured_names(record: Record) -> list[str]:
    """The contenders that have a time anywhere, the baseline first."""
    names = dict.fromkeys(name for row in record.rows for name in row.contenders)
    return [name for name in names if any(row.timed(name) for row in record.rows)]


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

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    write_whole(path, lambda partial: figure.savefig(partial, format=path.suffix[1:]))
