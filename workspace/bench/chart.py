# SPDX-License-Identifier: Apache-2.0
"""The plot of a run: one bar per variant (the median), every round as a dot, the ratio as title."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from custom_kernels.bench.plots import BASELINE_COLOUR, COLOURS, INK

from workspace.bench import serving
from workspace.bench.record import Record, Unit, higher_is_better
from workspace.bench.report import arrival, number
from workspace.host.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(record: Record, path: Path) -> None:
    """Draw `record` as a PNG of 1280 x 800 pixels at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=160, layout="constrained")
    settings, ratio = record.settings, record.comparison
    first = [variant.figures for variant in record.variants]
    panels = [(record.measured, record.unit, first), *_others(record)]
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    several = len(panels) > 1
    kernels = [", ".join(of.launches) or "vLLM's own kernels" for of in record.variants]
    names = [variant.name for variant in record.variants]
    labels = [f"{name}\n{ran}" for name, ran in zip(names, kernels, strict=True)]
    labels = names if several else labels
    for axes, (measured, unit, figures) in zip(every, panels, strict=True):
        _bars(axes, unit, figures, fontsize=10 if several else 13)
        axes.set_xticks(range(len(labels)), labels)
        better = "higher is better" if higher_is_better(unit) else "lower is better"
        axes.set_ylabel(f"{measured} ({better})")
    low, high = ratio.interval
    title = (
        f"{record.model.name}: {names[1]} / {names[0]} = {ratio.ratio:.3f} "
        f"[{low:.3f}, {high:.3f}], {ratio.verdict}"
    )
    if several:
        figure.suptitle(title, x=0.02, ha="left", fontweight="bold", color=INK)
    else:
        every[0].set_title(title, loc="left", fontweight="bold", color=INK)
    seed = f", seed {record.model.seed}" if record.model.seed is not None else ""
    stored = f"{record.model.quantized} · " if record.model.quantized else ""
    lines = [
        f"{record.model.weights} weights{seed} · {stored}{record.model.dtype} · {record.device}"
        f" · {settings.parallel} · {'eager' if settings.eager else 'compiled'}",
        f"requests: {settings.num_prompts}{arrival(settings)} of {settings.input_len} in, "
        f"{settings.output_len} out · "
        f"pairs of processes: {settings.repeats}, rounds each: {settings.rounds} · "
        f"vLLM {record.provenance.environment.get('vllm', '?')} · {record.started[:10]}",
    ]
    if several:
        lines.insert(0, " · ".join(f"{n}: {ran}" for n, ran in zip(names, kernels, strict=True)))
    if record.note:
        lines.append(record.note)
    figure.supxlabel("\n".join(lines), fontsize=8, color="#52606d", x=0.02, ha="left")
    if not record.valid:
        figure.text(
            0.5, 0.5, "INVALID", fontsize=64, color="#d64545",
            alpha=0.35, ha="center", va="center", rotation=20, fontweight="bold", zorder=4,
        )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_file(path, buffer.getvalue())


def _others(record: Record) -> Iterator[tuple[str, Unit, list[list[float]]]]:
    """Of METRIC=serve the medians beside the figure with the verdict: name, unit, and the rounds of
    each variant."""
    for kind in (serving.FIRST, serving.EACH):
        if kind.name in {figure.name for figure in record.figures}:
            rounds = (
                [done for process in variant.processes for done in process.rounds]
                for variant in record.variants
            )
            yield (
                f"{kind.name}, {kind.unit}",
                kind.unit,
                [serving.figures(kind, of) for of in rounds],
            )


def _bars(axes: Axes, unit: Unit, variants: Sequence[Sequence[float]], *, fontsize: int) -> None:
    """A bar per variant, and a dot per round."""
    for position, (figures, colour) in enumerate(
        zip(variants, (BASELINE_COLOUR, COLOURS[0]), strict=True)
    ):
        axes.bar(position, median(figures), width=0.55, color=colour, zorder=2)
        spread = [0.16 * (2 * i / max(1, len(figures) - 1) - 1) for i in range(len(figures))]
        axes.scatter(
            [position + s for s in spread],
            figures,
            s=14,
            color=INK,
            alpha=0.65,
            linewidths=0,
            zorder=3,
        )
        axes.annotate(
            number(median(figures), unit),
            (position, 0),
            xytext=(0, 10),
            textcoords="offset points",
            ha="center",
            fontsize=fontsize,
            fontweight="bold",
            color="white",
            zorder=4,
        )
    axes.set_xlim(-0.6, len(variants) - 0.4)
    axes.set_ylim(0, 1.2 * max(map(max, variants)))
    axes.grid(axis="y", color="#e4e7eb", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
