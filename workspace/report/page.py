# SPDX-License-Identifier: Apache-2.0
"""`make report`: one page of HTML of the records, or of two side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from custom_kernels.bench import compare
from custom_kernels.bench import report as kernel_report
from custom_kernels.bench.record import RecordError
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.table import Table
from rich.text import Text

from workspace.bench import report as engine_report
from workspace.fork.tree_state import shown
from workspace.host.errors import WorkspaceError, require
from workspace.host.files import write_file
from workspace.host.paths import BENCHMARKS, RESULTS, STATE
from workspace.host.text import say
from workspace.report import charts, records
from workspace.report.charts import Chart
from workspace.report.records import Engine, Kernels
from workspace.verbs import TwoRecords

FOLDERS = (RESULTS, BENCHMARKS / "engine", BENCHMARKS / "kernels")
MOST = 30
"""Rows in the chart of two records; the table has all."""


@dataclass(frozen=True)
class Article:
    """What the page has of one record, in the words and the table of the screen."""

    id: str
    """That of the file, so that links to it stay."""
    title: str
    verdict: str
    lines: list[str]
    warnings: list[str]
    charts: list[Chart]
    table: Table
    command: str
    provenance: dict[str, object]
    panels: list[Chart] = field(default_factory=list)
    """With the legend of the first chart."""


@dataclass(frozen=True)
class Page:
    """What the template is filled with; it leaves out what is empty."""

    title: str
    speeds: Chart | None = None
    engine: list[Article] = field(default_factory=list)
    kernels: list[Article] = field(default_factory=list)
    histories: list[Chart] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    both: list[Article] = field(default_factory=list)
    """Two records side by side."""
    change: list[str] = field(default_factory=list)
    """What is said of B against A."""
    changes: Chart | None = None
    table: Table | None = None


def run(options: TwoRecords, folders: Sequence[Path] = FOLDERS, results: Path = RESULTS) -> Path:
    """Write the page of the records in `folders`, or of the two that are named, to `results`.

    Raises:
        WorkspaceError: there is no record, only one is named, or two cannot be compared.
    """
    if bool(options.a) != bool(options.b):
        raise WorkspaceError("name both records: make report A=before.json B=after.json")
    if options.a and options.b:
        path = results / "report-A-B.html"
        try:
            page = two(Path(options.a), Path(options.b))
        except RecordError as error:
            raise WorkspaceError(str(error)) from error
    else:
        path = results / "report.html"
        page = everything(folders)
    write_file(path, render(page).encode())
    say(f"wrote {shown(path)}")
    return path


def everything(folders: Sequence[Path]) -> Page:
    """All records in these folders.

    Raises:
        WorkspaceError: there is none.
    """
    found, left_out = records.find(folders)
    if not found:
        names = ", ".join(map(shown, folders))
        raise WorkspaceError(f"no record in {names}; run make bench or make bench-kernels")
    engine = [one for one in found if isinstance(one, Engine)]
    kernels = [one for one in found if isinstance(one, Kernels)]
    valid = [
        (f"{number} {one.title}", one.speed, one.record.comparison.verdict)
        for number, one in enumerate(engine, 1)
        if one.speed
    ]
    axis = "speed, second / first variant"
    return Page(
        "Benchmarks",
        speeds=charts.intervals(valid, axis) if valid else None,
        engine=[_article(one, found) for one in engine],
        kernels=[_article(one, found) for one in kernels],
        histories=charts.history(kernels),
        left_out=left_out,
    )


def two(a: Path, b: Path) -> Page:
    """Record `b` against record `a`.

    Raises:
        RecordError: one is none, or they cannot be compared.
    """
    result = compare.compare(compare.read(a), compare.read(b))
    both = [records.read(path) for path in (a, b)]
    most = sorted(result.changes, key=lambda change: -abs(math.log(change.ratio.value)))[:MOST]
    most.sort(key=lambda change: -change.ratio.value)
    rows = [
        (f"{change.labels}, {change.contender}", change.ratio, change.ratio.verdict)
        for change in most
    ]
    return Page(
        f"{b.stem} against {a.stem}",
        both=[_article(one, both, f"{side}: ") for one, side in zip(both, "AB", strict=True)],
        change=[plain(compare.verdict_line(result)), *result.notes],
        changes=charts.intervals(rows, "speed, B / A"),
        table=compare.table(result),
    )  # fmt: skip


def _article(one: Engine | Kernels, beside: Sequence[Engine | Kernels], side: str = "") -> Article:
    return _kernels(one, side) if isinstance(one, Kernels) else _engine(one, beside, side)


def _engine(one: Engine, beside: Sequence[Engine | Kernels], side: str) -> Article:
    """A run of the engine. Its noise is that of one `beside` it with the same workload, in which
    both variants ran vLLM's own kernels."""
    run = one.record
    table = engine_report.table(run)
    noise = (
        other.speed
        for other in beside
        if isinstance(other, Engine)
        and other.workload == one.workload
        and not any(variant.launches for variant in other.record.variants)
    )
    return Article(
        id=f"{side[:1]}{one.path.stem}",
        title=f"{side}{one.title}",
        verdict=run.comparison.verdict if run.valid else "invalid",
        lines=[
            plain(str(text)) for text in (table.title, table.caption, *engine_report.lines(run))
        ],
        warnings=[f"INVALID, do not use: {failure}" for failure in run.failures],
        charts=[charts.rounds(run, next(noise, None))],
        table=table,
        command=run.command,
        provenance={"record": shown(one.path), "time": one.time, "seconds": run.duration_s}
        | run.provenance.model_dump(),
    )


def _kernels(one: Kernels, side: str) -> Article:
    run = one.record
    roofline = charts.roofline(run)
    return Article(
        id=f"{side[:1]}{one.path.stem}",
        title=f"{side}{one.title}",
        verdict="invalid" if run.failures else "",
        lines=[
            kernel_report.headline(run),
            *kernel_report.summary_lines(run),
            *(f"not timed: {who}: {reason}" for who, reason in run.skipped.items()),
        ],
        warnings=[*(f"failed: {failure}" for failure in run.failures), *run.warnings],
        charts=[roofline] if roofline else [],
        table=kernel_report.table(run),
        command=run.provenance.command,
        provenance={"record": shown(one.path)} | run.provenance.model_dump(exclude={"command"}),
        panels=charts.ratios(run),
    )


def render(page: Page) -> str:
    """One file with everything in it."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return templates.get_template("page.html").render(page=page, cells=cells, library=_library())


def plain(markup: str) -> str:
    """A text without Rich's markup."""
    return Text.from_markup(markup).plain


def cells(table: Table) -> list[tuple[str, ...]]:
    """The rows of a table of the screen, the first with its heads."""
    columns = [[column.header, *column.cells] for column in table.columns]
    return list(zip(*([plain(str(cell)) for cell in column] for column in columns), strict=True))


def _library() -> str:
    """Vega, Vega-Lite and vega-embed as one script; kept, because bundling takes seconds."""
    require("vl_convert")
    import vl_convert

    kept = STATE / "report" / f"vega-{version('vl-convert-python')}.js"
    if not kept.exists():
        write_file(kept, vl_convert.javascript_bundle().encode())  # pyrefly: ignore[missing-argument]
    # A browser would take `</script` in a string for the end of the script.
    return kept.read_text().replace("</script", "<\\/script")
