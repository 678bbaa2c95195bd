# SPDX-License-Identifier: Apache-2.0
"""What pages and pictures show of the records in benchmarks/, written from them.

python -m workspace.report.tables     # after a record has come or gone
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import geometric_mean

from custom_kernels import sparsity
from custom_kernels.bench import plots
from custom_kernels.bench.compare import Ratio

from workspace.bench import chart
from workspace.bench.report import arrival
from workspace.host.files import write_file
from workspace.host.paths import BENCHMARKS, ROOT
from workspace.host.text import plural, with_blocks
from workspace.report import records
from workspace.report.records import Engine, Kernels

COMMAND = "python -m workspace.report.tables"
PAGES = (ROOT / "README.md", BENCHMARKS / "README.md")


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    for cells in (heads, ["---"] * len(list(heads)), *rows):
        yield f"| {' | '.join(cells)} |"


def _link(one: Engine | Kernels, page: Path) -> str:
    """The record, and the pictures beside it."""
    link = f"[{one.path.stem}]({one.path.relative_to(page.parent)})"
    for name, ending in (("plot", ""), ("ratio", "-ratio"), ("roofline", "-roofline")):
        picture = one.path.with_name(f"{one.path.stem}{ending}.png")
        if picture.exists():
            link += f" ([{name}]({picture.relative_to(page.parent)}))"
    return link


def engine(page: Path, *, only_clear: bool = False) -> Iterator[str]:
    """The runs of the engine, the largest model first.

    Args:
        only_clear: leave out CPUs, ambiguous verdicts, and runs without custom kernels.
    """
    found, _ = records.find([BENCHMARKS / "engine"])
    runs = [one for one in found if isinstance(one, Engine)]
    runs.sort(key=lambda one: (-(one.record.model.parameters or 0), one.path.stem))
    rows = []
    for one in runs:
        run, settings = one.record, one.record.settings
        ambiguous = run.comparison.verdict == "ambiguous"
        before, after = run.variants
        if only_clear and (ambiguous or run.device_kind == "cpu" or not after.launches):
            continue
        ran = ", ".join(f"`{name}`" for name in after.launches) or f"vLLM's own, {after.name}"
        ran += f" in `{settings.layers}`" if settings.layers else ""
        ran = f"{settings.quantization}: {ran}" if settings.quantization else ran
        ran += f" against {before.name}" if before.name != "stock" else ""
        ratio = Ratio(run.comparison.ratio, *run.comparison.interval)
        reason = run.comparison.because.partition(";")[0]
        rows.append(
            [
                _link(one, page),
                one.card,
                f"{run.model.name.rpartition('/')[2]}, {run.model.weights} weights, "
                f"{settings.metric}, {plural(settings.num_prompts, 'request')}"
                f"{arrival(settings)} of "
                f"{settings.input_len} in, {settings.output_len} out, "
                f"{'eager' if settings.eager else 'compiled'}",
                ran,
                ratio.text,
                f"ambiguous: {reason}" if ambiguous else run.comparison.verdict,
            ]
        )
    heads = ("record", "device", "workload", "custom kernels", "custom / baseline", "verdict")
    return _table(heads, rows)


def kernels(page: Path) -> Iterator[str]:
    """The geometric means of every contender in every record."""
    found, _ = records.find([BENCHMARKS / "kernels"])
    rows = []
    for one in sorted(found, key=lambda one: one.path.stem):
        assert isinstance(one, Kernels)
        run = one.record
        sizes = sorted(int(row.labels["M"]) for row in run.rows)
        models = ", ".join(dict.fromkeys(str(row.labels["model"]) for row in run.rows))
        cases = f"{run.dtype}, {models}, M {sizes[0]} to {sizes[-1]}, {len(sizes)} cases"
        first = [_link(one, page), one.card, cases, run.baseline]
        for name, groups in run.summary.items():
            whole = groups.get("all") or next(iter(groups.values()))
            rows.append(
                [
                    *first,
                    name,
                    f"{whole.geometric_mean:.3f}",
                    f"{whole.lowest:.3f} to {whole.highest:.3f}",
                    ", ".join(f"{count} {verdict}" for verdict, count in whole.verdicts.items()),
                ]
            )
            first = [""] * len(first)
    heads = ("record", "device", "cases", "baseline", "contender", "geometric mean", "range")
    return _table((*heads, "of its cases"), rows)


def sparse() -> Iterator[str]:
    """Geometric means over the sparse layers, by pattern and M, and what limits them."""
    one = records.read(BENCHMARKS / "kernels" / "sparse_gemm-h200.json")
    assert isinstance(one, Kernels)
    run = one.record
    ridge = run.ceilings.flops_per_second[run.dtype] / run.ceilings.bytes_per_second
    ratios: dict[tuple[str, int], dict[str, list[float]]] = {}
    for mark in plots.marks(run):
        case = (str(mark.row.labels["pattern"]), int(mark.row.labels["M"]))
        if mark.timed.ratio is not None:
            ratios.setdefault(case, {}).setdefault(mark.name, []).append(mark.timed.ratio)
    rows = []
    for (name, m), of_case in sorted(ratios.items()):
        pattern = sparsity.pattern(name)
        # Products run at twice the dense rate, over a row that is expanded. With few tokens weights
        # are read: 5 bits for each value of the expanded row, against 8.
        rate = 2 if 2 * m > ridge else 8 / 5
        limit = rate * pattern.group / (2 * pattern.nonzeros)
        if pattern.mixed:
            limit = 2 / (1 / rate + 1)
        means = (
            f"{geometric_mean(of_case[backend]):.3f}" if backend in of_case else ""
            for backend in run.backends
        )
        rows.append([name, str(m), *means, f"{limit:.2f}"])
    return _table(("pattern", "M", *run.backends, "limit"), rows)


def render(page: Path) -> str:
    """The page with current tables."""
    blocks = {
        "engine": partial(engine, page),
        "front": partial(engine, page, only_clear=True),
        "kernels": partial(kernels, page),
        "sparse": sparse,
    }
    return with_blocks(page.read_text(), "records", blocks)


def draw() -> None:
    """Draw the pictures beside the records of both benches again."""
    for picture in sorted([*BENCHMARKS.glob("engine/*.png"), *BENCHMARKS.glob("kernels/*.png")]):
        stem = picture.stem.removesuffix("-ratio").removesuffix("-roofline")
        one = records.read(picture.with_name(f"{stem}.json"))
        if isinstance(one, Engine):
            chart.draw(one.record, picture)
        else:
            plot = plots.ratios if picture.stem.endswith("-ratio") else plots.roofline
            plot(one.record, picture)


if __name__ == "__main__":
    for path in PAGES:
        write_file(path, render(path).encode())
    draw()
