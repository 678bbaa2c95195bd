# SPDX-License-Identifier: Apache-2.0
"""The charts of a report: records as Vega-Lite specifications, https://vega.github.io/vega-lite.

Vega draws SVG in which each mark has the text `what` of its row as its label for screen readers.
Ink is `currentColor`, so that the page's style sheet decides between dark and light; every series
has a colour and a shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from custom_kernels.bench import compare, plots
from custom_kernels.bench.compare import Ratio
from custom_kernels.bench.intervals import Verdict
from custom_kernels.bench.record import Record as KernelRecord
from custom_kernels.bench.record import label_text

from workspace.bench.record import Record as EngineRecord
from workspace.bench.record import higher_is_better
from workspace.bench.report import number
from workspace.report.records import Kernels

Spec = dict[str, Any]
Datum = dict[str, str | float]
Series = Mapping[str, tuple[str, str]]
"""Name → colour and shape."""

INK = "currentColor"
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right")
VERDICTS: Series = {
    "faster": (plots.COLOURS[0], "triangle-up"), "same": (plots.COLOURS[3], "circle"),
    "ambiguous": (plots.BASELINE_COLOUR, "square"), "slower": (plots.COLOURS[1], "triangle-down"),
}  # fmt: skip
SAME = 0.02
"""Drawn as a band around 1: within it nothing is told apart."""


@dataclass(frozen=True)
class Chart:
    """Layers over common data, as wide as their place in the page."""

    description: str
    data: Iterable[Datum]
    layers: Sequence[Spec]
    height: int
    legend: Series
    title: str = ""

    @property
    def spec(self) -> Spec:
        """As Vega-Lite takes it."""
        return {
            "description": self.description, "width": "container", "height": self.height,
            **_data(self.data), "layer": self.layers,
        }  # fmt: skip


def _data(data: Iterable[Datum]) -> Spec:
    """Floats with five significant digits, so that a page stays small."""
    values = [
        {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in datum.items()}
        for datum in data
    ]
    return {"data": {"values": values}}


def _marks(mark: str, encoding: Spec, data: Iterable[Datum] | None = None, **style: object) -> Spec:
    """Lines and areas, over the chart's data if they have none of their own. Points have the
    figures, so screen readers skip these."""
    own = {} if data is None else _data(data)
    return {**own, "mark": {"type": mark, "aria": False, **style}, "encoding": encoding}


def _points(encoding: Spec, series: Series, field: str, size: int = 45) -> Spec:
    """Points whose colour and shape are those of the series that `field` names. The page has the
    legend, which wraps there."""
    colours, shapes = zip(*series.values(), strict=True)
    by = {
        channel: {
            **_nominal(field),
            "legend": None,
            "scale": {"domain": [*series], "range": values},
        }
        for channel, values in (("color", colours), ("shape", shapes))
    }
    text = {name: {**_nominal("what"), "title": None} for name in ("tooltip", "description")}
    mark = {"type": "point", "filled": True, "size": size, "opacity": 0.9}
    return {"mark": mark, "encoding": {**encoding, **by, **text}}


def _nominal(field: str) -> Spec:
    return {"field": field, "type": "nominal"}


def _colour(points: Spec) -> Spec:
    """The colour of points, for the lines that belong to them."""
    return {"color": points["encoding"]["color"]}


def _series(names: Iterable[str]) -> Series:
    """As in the plots beside a record: the first, the baseline, is grey."""
    colours = (plots.BASELINE_COLOUR, *plots.COLOURS)
    return {
        name: (colours[i % len(colours)], SHAPES[i % len(SHAPES)])
        for i, name in enumerate(dict.fromkeys(names))
    }


def _contenders(record: KernelRecord) -> Series:
    return _series([record.baseline, *plots.measured_names(record)])


# --- ratios with their intervals ------------------------------------------------------------------


def _ratio(what: str, ratio: Ratio, **of: str | float) -> Datum:
    """A ratio with its interval and its text."""
    what = f"{what}: {ratio.text}"
    return {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "what": what, **of}


def _ratio_axis(data: Sequence[Datum], title: str) -> Spec:
    """An axis over the intervals, and at least 5 % around 1."""
    low = min([0.95, *(float(datum["low"]) for datum in data)])
    high = max([1.05, *(float(datum["high"]) for datum in data)])
    scale = {"domain": [low, high], "nice": False, "zero": False, "padding": 4}
    axis = {"grid": True, "tickCount": 8}
    return {"type": "quantitative", "title": title, "axis": axis, "scale": scale}


def intervals(rows: Iterable[tuple[str, Ratio, Verdict]], axis: str) -> Chart:
    """A line per ratio, under its name."""
    data = [
        _ratio(f"{name}, {verdict}", ratio, row=name, verdict=verdict)
        for name, ratio, verdict in rows
    ]
    x = _ratio_axis(data, axis)
    bare = {"labels": False, "ticks": False, "domain": False}
    y = {"y": {**_nominal("row"), "sort": None, "title": None, "axis": bare}}
    points = _points({**y, "x": {"field": "ratio", **x}}, VERDICTS, "verdict", size=90)
    names = {**y, "x": {"value": 4}, "text": {"field": "row"}}
    ends = {**y, "x": {"field": "low", **x}, "x2": {"field": "high"}, **_colour(points)}
    layers = [
        _marks("rule", {"x": {"datum": 1, **x}}, [{}], color=INK),
        _marks("text", names, align="left", dy=-11, fontSize=11, color=INK),
        _marks("rule", ends, strokeWidth=3),
        points,
    ]
    about = f"{len(data)} ratios with their intervals: {axis}"
    return Chart(about, data, layers, 40 * len(data), VERDICTS)


def history(records: Iterable[Kernels]) -> list[Chart]:
    """The geometric mean of each contender's ratios, record by record: a chart wherever several
    records have the same operation, dtype, baseline, device and cases."""
    groups: dict[tuple[str, frozenset[str]], list[Kernels]] = {}
    for one in sorted(records, key=lambda one: one.time):
        cases = frozenset(label_text(row.labels) for row in one.record.rows)
        groups.setdefault((one.title, cases), []).append(one)
    return [
        _history(f"{title}, {len(cases)} cases", len(cases), runs)
        for (title, cases), runs in groups.items()
        if len(runs) > 1
    ]


def _history(title: str, cases: int, runs: Sequence[Kernels]) -> Chart:
    data: list[Datum] = []
    for place, run in enumerate(runs, 1):
        origin = run.record.provenance
        commit = f"{(origin.git_commit or 'unknown')[:8]}{'+' if origin.git_dirty else ''}"
        ratios = compare.kernels(run.record).ratios
        for name in dict.fromkeys(name for _, name in ratios):
            of_name = [ratio for (_, other), ratio in ratios.items() if other == name]
            if len(of_name) == cases and all(ratio.low > 0 for ratio in of_name):
                mean = compare.mean(of_name)
                what = f"{name} at {commit}, {run.time[:10]}"
                data.append(_ratio(what, mean, record=f"{place} {commit}", contender=name))
    axis = {"labelAngle": 0, "labelOverlap": True}
    x = {"x": {**_nominal("record"), "sort": None, "title": "commits, as measured", "axis": axis}}
    y = _ratio_axis(data, "geometric mean of ratios")
    drawn = _series([runs[0].record.baseline, *(str(datum["contender"]) for datum in data)])
    points = _points({**x, "y": {"field": "ratio", **y}}, drawn, "contender")
    return Chart(f"{title}: ratios over commits", data, _lines(x, y, points), 240, drawn, title)


def ratios(record: KernelRecord) -> list[Chart]:
    """Baseline time / own time over M: a chart per layer and pattern, all on the same scale."""
    panels: dict[str, list[Datum]] = {}
    for mark in plots.marks(record):
        labels, found = mark.row.labels, mark.timed.comparison
        if "M" not in labels or found is None:
            continue
        names = (str(labels[k]) for k in ("model", "layer", "pattern") if k in labels)
        what = f"{mark.name}, M={labels['M']}, {mark.timed.verdict}"
        panels.setdefault(" ".join(names), []).append(
            _ratio(what, Ratio(*found), M=labels["M"], contender=mark.name)
        )
    y = _ratio_axis([datum for data in panels.values() for datum in data], "ratio")
    x = {
        "field": "M", "type": "quantitative", "title": "M (tokens)",
        "scale": {"type": "log", "base": 2, "nice": False, "padding": 8},
    }  # fmt: skip
    charts = []
    for title, data in panels.items():
        sizes = sorted({datum["M"] for datum in data})
        at = {"x": {**x, "axis": {"values": sizes, "format": "d", "labelOverlap": True}}}
        where = {**at, "y": {"field": "ratio", **y}}
        points = _points(where, _contenders(record), "contender")
        about = f"{title}: time of {record.baseline} / own time over M, {len(data)} ratios"
        charts.append(Chart(about, data, _lines(at, y, points), 170, {}, title))
    return charts


def _lines(x: Spec, y: Spec, points: Spec) -> list[Spec]:
    """Points with lines through them, their intervals, and the band around 1."""
    colour = _colour(points)
    band = {"y": {"datum": 1 - SAME, **y}, "y2": {"datum": 1 + SAME}}
    return [
        _marks("rect", band, [{}], color=INK, opacity=0.1),
        _marks("rule", {"y": {"datum": 1, **y}}, [{}], color=INK),
        _marks("line", {**x, "y": {"field": "ratio", **y}, **colour}, strokeWidth=1.5),
        _marks("rule", {**x, "y": {"field": "low", **y}, "y2": {"field": "high"}, **colour}),
        points,
    ]


# --- figures --------------------------------------------------------------------------------------


def rounds(record: EngineRecord, same_kernels: Ratio | None) -> Chart:
    """Every round of every process, in the order in which they ran, and medians as lines.

    Args:
        same_kernels: of a run of the same workload in which both variants had vLLM's own kernels:
            drawn as a band around the baseline's median.
    """
    unit = record.unit
    data: list[Datum] = [
        {
            "process": process.order, "round": i, "figure": figure,
            "variant": variant.name,
            "what": f"process {process.order}, {variant.name}, round {i}: "
                    f"{number(figure, unit)} {unit}",
        }
        for process, variant in sorted(
            ((process, variant) for variant in record.variants for process in variant.processes),
            key=lambda pair: pair[0].order,
        )
        for i, figure in enumerate(process.figures, 1)
    ]  # fmt: skip
    better = "higher is better" if higher_is_better(unit) else "lower is better"
    title = f"{record.measured} ({better})"
    axis = {"labelAngle": 0, "labelOverlap": True, "ticks": False}
    order = "processes, as they ran"
    x = {"x": {**_nominal("process"), "sort": None, "title": order, "axis": axis}}
    y = {"type": "quantitative", "title": title, "scale": {"zero": False, "padding": 8}}
    drawn = _series(variant.name for variant in record.variants)
    x["xOffset"] = {"field": "round", "type": "quantitative", "scale": {"zero": False}}
    medians = _marks("line", {**x, "y": {"field": "median", **y}, "detail": x["x"]}, color=INK)
    median = {"op": "median", "field": "figure", "as": "median"}
    medians["transform"] = [{"joinaggregate": [median], "groupby": ["process"]}]
    layers = [medians, _points({**x, "y": {"field": "figure", **y}}, drawn, "variant")]
    about = f"{len(data)} rounds: {title}"
    if same_kernels:
        # Which of two equal variants was faster is chance.
        off = max(1 / same_kernels.low, same_kernels.high)
        base = record.variants[0].median
        band = {"y": {"datum": base / off, **y}, "y2": {"datum": base * off}}
        layers.insert(0, _marks("rect", band, [{}], color=INK, opacity=0.1))
        about += f"; the same kernels in both variants differ by up to {off - 1:.1%}"
    return Chart(about, data, layers, 260, drawn)


def roofline(record: KernelRecord) -> Chart | None:
    """Every measurement under the ceilings of the same run; None if nothing was measured."""
    measured = plots.marks(record)
    if not measured:
        return None
    operations = plots.computes(record)
    units = ("TFLOP/s", "operations per byte that must move")
    unit, x_title = units if operations else ("TB/s", "MB that must move")
    data: list[Datum] = []
    for mark in measured:
        what = f"{mark.name}, {label_text(mark.row.labels)}: {mark.timed.us:.4g} µs, {mark.y:.4g} "
        share = mark.timed.percent_of_roofline
        what += unit if share is None else f"{unit}, {share:.0f} % of the roofline"
        data.append({"x": mark.x, "y": mark.y, "contender": mark.name, "what": what})
    copy = record.ceilings.bytes_per_second / 1e12
    peaks = {name: rate / 1e12 for name, rate in record.ceilings.flops_per_second.items()}
    peaks = peaks if operations else {}
    xs, ridges = [mark.x for mark in measured], [peak / copy for peak in peaks.values()]
    low, high = min(xs + [ridge / 10 for ridge in ridges]) / 1.5, max(xs + ridges) * 1.5
    roofs: list[Datum] = [
        {"x": x, "y": y if operations else copy, "roof": name}
        for name, peak in (peaks or {"": math.inf}).items()
        for x, y in plots.roof(copy, peak, low, high)
    ]
    middle = math.sqrt(low * min([high, *ridges]))  # of the slope
    names: list[Datum] = [
        {"x": middle, "y": copy * middle if operations else copy, "name": f"copy {copy:.2f} TB/s"},
        *(
            {"x": peak / copy, "y": peak, "name": f"{name} {peak:.0f} TFLOP/s"}
            for name, peak in peaks.items()
        ),
    ]
    axis = {"format": "~g", "tickCount": 6, "grid": False}
    log = {"type": "log", "domain": [low, high], "nice": False}
    scale = {"type": "log"} if operations else {"zero": True}
    where: Spec = {
        "x": {"field": "x", "type": "quantitative", "title": x_title, "axis": axis, "scale": log},
        "y": {"field": "y", "type": "quantitative", "title": unit, "axis": axis, "scale": scale},
    }
    named = {**where, "text": {"field": "name"}}
    layers = [
        _marks("line", {**where, "detail": {"field": "roof"}}, roofs, color=INK, strokeWidth=1.5),
        _marks("text", named, names, align="right", dx=-4, dy=-8, fontSize=12, color=INK),
        _points(where, _contenders(record), "contender"),
    ]
    under = " and ".join(str(datum["name"]) for datum in names)
    about = f"Roofline, {len(data)} measurements: {unit} over {x_title}, under {under}"
    return Chart(about, data, layers, 380, _contenders(record))
