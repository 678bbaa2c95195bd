# SPDX-License-Identifier: Apache-2.0
"""The report: complete for the records in git, and working in a real browser without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from custom_kernels.bench import compare

from tests.workspace.report import browser
from workspace.host.errors import WorkspaceError
from workspace.host.paths import BENCHMARKS, ROOT
from workspace.report import charts, page, records
from workspace.verbs import TwoRecords

A, B = (ROOT / "tests" / "kernels" / "data" / f"gemm_h200_{side}.json" for side in "ab")
ENGINE, KERNELS = BENCHMARKS / "engine", BENCHMARKS / "kernels"


def test_the_records_in_git_make_a_page_below_5_mb() -> None:
    shown = page.everything([ENGINE, KERNELS])
    assert len(page.render(shown).encode()) < 5_000_000
    assert len(shown.engine) == len(list(ENGINE.glob("*.json")))
    assert len(shown.kernels) + len(shown.left_out) == len(list(KERNELS.glob("*.json")))
    for one in [*shown.engine, *shown.kernels]:
        assert one.charts, one.id
        assert one.table.row_count, one.id
        assert one.command, one.id
        assert "record" in one.provenance
    # Not of either bench: named, not dropped without a word.
    assert len(shown.left_out) == 2


def test_an_invalid_run_is_marked_and_not_among_the_results(tmp_path: Path) -> None:
    stored = json.loads((ENGINE / "tiny-qwen2-throughput-cpu.json").read_text())
    stored |= {"valid": False, "failures": ["stock ran <gemm.cublaslt>"]}
    (tmp_path / "bad.json").write_text(json.dumps(stored))
    shown = page.everything([tmp_path])
    assert shown.speeds is None
    assert shown.engine[0].verdict == "invalid"
    assert "INVALID, do not use: stock ran &lt;gemm.cublaslt&gt;" in page.render(shown)


def test_the_noise_of_a_workload_is_drawn_where_the_same_kernels_ran_twice() -> None:
    """tiny-qwen2-pristine-cpu has vLLM's own kernels in both variants, 1.022 [1.017, 1.027]."""
    shown = {one.id: one for one in page.everything([ENGINE]).engine}
    about = "the same kernels in both variants differ by up to 2.7%"
    assert about in shown["tiny-qwen2-throughput-cpu"].charts[0].description
    assert about not in shown["qwen2.5-7b-latency-h200"].charts[0].description


def test_a_history_is_of_records_with_the_same_cases(tmp_path: Path) -> None:
    fewer = json.loads(B.read_text())
    fewer["rows"] = fewer["rows"][1:]
    (tmp_path / "fewer.json").write_text(json.dumps(fewer))
    of = [records.read(path) for path in (A, B, tmp_path / "fewer.json")]
    (chart,) = charts.history([one for one in of if isinstance(one, records.Kernels)])
    drawn = chart.spec["data"]["values"]
    for path, place in ((A, "1 "), (B, "2 ")):
        mean = compare.mean([*compare.read(path).ratios.values()])
        (point,) = (one for one in drawn if one["record"].startswith(place))
        assert point["ratio"] == pytest.approx(mean.value, rel=1e-4)


def test_two_records_show_the_verdict_of_compare(tmp_path: Path) -> None:
    path = page.run(TwoRecords(str(A), str(B)), results=tmp_path)
    verdict = compare.verdict_line(compare.compare(compare.read(A), compare.read(B)))
    assert page.plain(verdict) in path.read_text()
    with pytest.raises(WorkspaceError, match="name both records"):
        page.run(TwoRecords(a=str(A)))
    with pytest.raises(WorkspaceError, match="cannot read"):
        page.run(TwoRecords(str(A), str(tmp_path / "none.json")), results=tmp_path)


def test_a_folder_without_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"no record in .*; run make bench"):
        page.everything([tmp_path])


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    """The report of some records of each kind, drawn on a phone's width."""
    program = browser.installed()
    if program is None:
        pytest.skip("no Chromium that starts; on Debian: apt-get install chromium")
    folder = tmp_path_factory.mktemp("report")
    for path in (
        A, B, ENGINE / "qwen2.5-7b-latency-h200.json", KERNELS / "quant_expand-h200.json",
    ):  # fmt: skip
        shutil.copy(path, folder)
    report = page.run(TwoRecords(), [folder], folder)
    with browser.opened(program, folder / "profile") as found:
        found.open(report, width=360)
        yield found


def test_every_chart_is_drawn_without_a_message_or_a_request(tab: browser.Tab) -> None:
    figures = "[...document.querySelectorAll('figure')]"
    drawn = tab.evaluate(f"{figures}.map(f => f.querySelectorAll('svg path[aria-label]').length)")
    assert len(drawn) > 10
    assert all(drawn)
    assert tab.console == []
    assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_keys_reach_every_mark_and_a_screen_reader_can_name_it(tab: browser.Tab) -> None:
    tab.evaluate("document.querySelector('nav li:last-of-type > a').focus()")
    for _ in range(20):
        tab.press("Tab")
        if tab.evaluate("document.activeElement.matches('figure')"):
            break
    focused = "document.activeElement.getAttribute('aria-label')"
    assert "ratios with their intervals" in tab.evaluate(focused)
    tab.press("ArrowRight")
    assert "Qwen2.5-7B, latency, H200, faster: 1.040 [1.016, 1.064]" in tab.evaluate(focused)
    tab.press("Escape")
    assert tab.evaluate("document.activeElement.matches('figure')")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    names = [node.get("name", {}).get("value", "") for node in nodes if not node["ignored"]]
    assert any(name.startswith("Roofline, ") for name in names)
    assert any(name.startswith("cuda, M=16") for name in names)


def test_ink_follows_dark_mode_and_paper_is_light(tab: browser.Tab) -> None:
    inks = {}
    for media, scheme in (("screen", "light"), ("print", "dark"), ("screen", "dark")):
        tab.media(media, scheme)
        label = "document.querySelector('figure svg text[fill=currentColor]')"
        inks[media, scheme] = tab.evaluate(f"getComputedStyle({label}).fill")
    assert inks["screen", "light"] == inks["print", "dark"] != inks["screen", "dark"]


def test_two_records_are_drawn_side_by_side(tab: browser.Tab, tmp_path: Path) -> None:
    tab.open(page.run(TwoRecords(str(A), str(B)), results=tmp_path), width=1400)
    lefts = "[...document.querySelectorAll('article')].map(a => a.getBoundingClientRect().left)"
    first, second = tab.evaluate(lefts)
    assert first < second
    assert tab.console == []
