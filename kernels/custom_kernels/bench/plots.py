# SPDX-License-Identifier: Apache-2.0
"""The plots of a kernel record: how close to the roof, and how far ahead of the baseline.

The roof is that of Williams, Waterman, Patterson: Roofline (2009), with the copy bandwidth and the
matmul peaks that were measured in the same run, not those of a data sheet.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from custom_kernels.bench.records import Record, write_whole

BASELINE_COLOUR, INK = "#7b8794", "#1f2933"
COLOURS = ("#2f6fde", "#d64545", "#2d9d78", "#b7791f", "#7c4dff", "#d4589a", "#0f8ea3", "#5f6b2d")
MARKERS = "os^Dv*XP"


FEW_OPERATIONS = 1.0
"""Per byte. Below it an operation does no more than touch what it moves; the ridge of a GPU's
roofline lies at some hundreds."""


def draw(record: Record, beside: Path) -> list[Path]:
    """Draw both plots of a record next to its file; returns where they are."""
    drawn = []
    for name, plot in (("roofline", roofline), ("ratio", ratios)):
        path = beside.with_name(f"{beside.stem}-{name}.png")
        if plot(record, path):
            drawn.append(path)
    return drawn


def roofline(record: Record, path: Path) -> bool:
    """Operations per second over operations per byte, one point per case and contender, under the
    measured ceilings. An operation that computes next to nothing is drawn as bytes per second over
    bytes. False, and no file, if nothing was measured."""
    names = measured_names(record)
    rows = record["rows"]
    if not names:
        return False
    figure, axes = _figure(8, 5.4)
    computes = any(row["flops"] > FEW_OPERATIONS * row["bytes"] for row in rows)
    xs: list[float] = []
    for place, name in enumerate(names):
        points = [
            (row["flops"] / row["bytes"], one["tflops"])
            if computes
            else (row["bytes"] / 1e6, one["gbytes_per_second"] / 1e3)
            for row in rows
            if (one := row["contenders"].get(name)) and "us" in one
        ]
        xs += [x for x, _ in points]
        axes.scatter(
            [x for x, _ in points],
            [y for _, y in points],
            s=22,
            color=_colour(record, names, name),
            marker=MARKERS[place % len(MARKERS)],
            alpha=0.8,
            linewidths=0,
            label=name,
            zorder=3,
        )
    copy = record["ceilings"]["bytes_per_second"] / 1e12
    low, high = min(xs) / 2, max(xs) * 2
    if computes:
        _roofs(axes, record["ceilings"]["flops_per_second"], copy, low, max(high, 2000))
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
    _finish(figure, axes, record, path, "how close to the limit")
    return True


def _roofs(axes: Any, peaks: dict[str, float], copy: float, low: float, high: float) -> None:
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
    baseline = record["baseline"]
    names = [name for name in measured_names(record) if name != baseline]
    rows = [row for row in record["rows"] if "M" in row["labels"]]
    groups = list(dict.fromkeys(_group(row) for row in rows))
    if not names or not groups:
        return False
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    layers = list(dict.fromkeys(str(row["labels"].get("layer", "")) for row in rows))
    crowded = len(names) * len(layers) > 6
    figure, _ = _figure(5.2 * columns + (2.4 if crowded else 1), 4 * lines + 0.6, axes=False)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for panel in panels.flat[len(groups) :]:
        panel.set_axis_off()
    for panel, group in zip(panels.flat, groups, strict=False):
        members = [row for row in rows if _group(row) == group]
        for name in names:
            for place, layer in enumerate(layers):
                colour = COLOURS[place % len(COLOURS)] if len(names) == 1 else None
                colour = colour or _colour(record, names, name)
                _line(panel, members, name, layer, colour, place)
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
    panel: Any, rows: Sequence[dict[str, Any]], name: str, layer: str, colour: str, place: int
) -> None:
    points = [
        (row["labels"]["M"], one["ratio"], one["low"], one["high"])
        for row in rows
        if str(row["labels"].get("layer", "")) == layer
        and (one := row["contenders"].get(name))
        and one.get("ratio") is not None
    ]
    if not points:
        return
    points.sort()
    ms = [point[0] for point in points]
    panel.plot(
        ms,
        [point[1] for point in points],
        marker=MARKERS[place % len(MARKERS)],
        linestyle=("-", "--", ":", "-.")[place % 4],
        markersize=3.5,
        linewidth=1,
        color=colour,
        label=f"{name} {layer}".strip(),
    )
    panel.fill_between(
        ms, [point[2] for point in points], [point[3] for point in points], color=colour, alpha=0.12
    )


def measured_names(record: Record) -> list[str]:
    """The contenders that have a time anywhere, the baseline first."""
    return list(
        dict.fromkeys(
            name for row in record["rows"] for name, one in row["contenders"].items() if "us" in one
        )
    )


def _group(row: dict[str, Any]) -> str:
    labels = row["labels"]
    return " ".join(str(labels[name]) for name in ("model", "pattern") if name in labels) or "all"


def _colour(record: Record, names: Sequence[str], name: str) -> str:
    if name == record["baseline"]:
        return BASELINE_COLOUR
    others = [other for other in names if other != record["baseline"]]
    return COLOURS[others.index(name) % len(COLOURS)]


def _title(record: Record, what: str) -> str:
    provenance = record["provenance"]
    return (
        f"{record['operation']} {record['dtype']}, {what} · {provenance.get('device', '?')} · "
        f"{provenance.get('time', '')[:10]}"
    )


def _figure(width: float, height: float, axes: bool = True) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    return figure, figure.add_subplot() if axes else None


def _finish(figure: Any, axes: Any, record: Record, path: Path, what: str) -> None:
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="lower right")
    axes.set_title(_title(record, what), fontsize=10, loc="left")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    write_whole(path, lambda beside: figure.savefig(beside, format=path.suffix[1:]))
