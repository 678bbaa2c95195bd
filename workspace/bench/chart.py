# SPDX-License-Identifier: Apache-2.0
"""The plot of a run: one bar per variant (the median), every round as a dot, the ratio as title."""

import io
from pathlib import Path

from custom_kernels.bench.plots import BASELINE_COLOUR, COLOURS, INK

from workspace.bench.record import Record
from workspace.bench.report import number
from workspace.host.files import write_file


def draw(record: Record, path: Path) -> None:
    """Draw `record` as a PNG of 1280 x 800 pixels at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for position, (variant, colour) in enumerate(
        zip(record.variants, (BASELINE_COLOUR, COLOURS[0]), strict=True)
    ):
        axes.bar(position, variant.median, width=0.55, color=colour, zorder=2)
        figures = variant.figures
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
            number(variant.median, record.unit),
            (position, 0),
            xytext=(0, 10),
            textcoords="offset points",
            ha="center",
            fontsize=13,
            fontweight="bold",
            color="white",
            zorder=4,
        )
    settings, ratio = record.settings, record.comparison
    axes.set_xticks(range(len(record.variants)), [_label(record, i) for i in (0, 1)])
    axes.set_xlim(-0.6, len(record.variants) - 0.4)
    axes.set_ylim(0, 1.2 * max(variant.highest for variant in record.variants))
    better = "higher is better" if record.unit == "tokens/s" else "lower is better"
    axes.set_ylabel(f"{settings.metric}, {record.unit} ({better})")
    axes.grid(axis="y", color="#e4e7eb", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    names = [variant.name for variant in record.variants]
    low, high = ratio.interval
    axes.set_title(
        f"{record.model.name}: {names[1]} / {names[0]} = {ratio.ratio:.3f} "
        f"[{low:.3f}, {high:.3f}], {ratio.verdict}",
        loc="left",
        fontweight="bold",
        color=INK,
    )
    seed = f", seed {record.model.seed}" if record.model.seed is not None else ""
    stored = f"{record.model.quantized} · " if record.model.quantized else ""
    lines = [
        f"{record.model.weights} weights{seed} · {stored}{record.model.dtype} · {record.device}"
        f" · TP {settings.tensor_parallel} · {'eager' if settings.eager else 'compiled'}",
        f"requests: {settings.num_prompts} of {settings.input_len} in, {settings.output_len} out · "
        f"pairs of processes: {settings.repeats}, rounds each: {settings.rounds} · "
        f"vLLM {record.provenance.environment.get('vllm', '?')} · {record.started[:10]}",
    ]
    if record.note:
        lines.append(record.note)
    figure.supxlabel("\n".join(lines), fontsize=8, color="#52606d", x=0.02, ha="left")
    if not record.valid:
        axes.text(
            0.5, 0.5, "INVALID", transform=axes.transAxes, fontsize=64, color="#d64545",
            alpha=0.35, ha="center", va="center", rotation=20, fontweight="bold", zorder=4,
        )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_file(path, buffer.getvalue())


def _label(record: Record, index: int) -> str:
    variant = record.variants[index]
    kernels = ", ".join(variant.launches) or "vLLM's own kernels"
    return f"{variant.name}\n{kernels}"
