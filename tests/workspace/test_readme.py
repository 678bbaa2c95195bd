# SPDX-License-Identifier: Apache-2.0
"""What the documentation claims is what the code has and the records say."""

from __future__ import annotations

import io
import json
import platform
import re
import sys
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import pytest
from custom_kernels.paths import PACKAGE
from rich.console import Console

from workspace import doctor
from workspace.bench import record, report
from workspace.environment.lock import locked
from workspace.fork import status
from workspace.host.paths import BENCHMARKS, PATCHES, ROOT, lock_files
from workspace.pins.model import load

README = (ROOT / "README.md").read_text()
FIRST_KERNELS = {"triton": "triton", "cuda": "skinny", "cupy": "cupy"}
"""The pages docs/first-kernel-*.md → the backend whose records they show. What they show of a run
without a GPU is compared in new_kernel/test_scaffold.py."""
PAGES = [
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md"))
    if not page.name.startswith("first-kernel-")
]


def test_the_versions_named_are_the_pinned_ones() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    for version, release in load().vllm.release.items():
        for words in (
            f"vLLM {version}", f"torch {release.torch}", f"triton {release.triton}",
            f"CUDA {release.cuda.release}",
        ):  # fmt: skip
            assert words in page
        assert release.cupy in page


def test_the_figures_quoted_for_few_tokens_and_quantization_are_those_of_the_records() -> None:
    page = " ".join((BENCHMARKS / "README.md").read_text().split())
    gemm = json.loads((BENCHMARKS / "kernels" / "gemm-h200.json").read_text())
    tuned = json.loads((PACKAGE / "gemm" / "tuning" / "NVIDIA-H200.json").read_text())
    chosen = [row["contenders"][choice(tuned, row["labels"])] for row in gemm["rows"]]
    verdicts = [one["verdict"] for one in chosen]
    assert (
        f"as `custom_gemm` chooses by them {geometric_mean([one['ratio'] for one in chosen]):.3f}: "
        f"{verdicts.count('FASTER')} faster, {verdicts.count('SAME')} same" in page
    )
    quantization = json.loads((BENCHMARKS / "kernels" / "quant_expand-h200.json").read_text())
    percents = [
        row["contenders"]["cuda"]["percent_of_copy"]
        for row in quantization["rows"]
        if row["labels"]["M"] >= 4096
    ]
    assert f"{min(percents):.1f} to {max(percents):.1f} % of the copy bandwidth" in page


def choice(tuned: dict[str, Any], labels: dict[str, Any]) -> str:
    """The backend that a tuning file names for a case."""
    for layer in tuned["choices"]:
        if (layer["N"], layer["K"]) == (labels["N"], labels["K"]):
            for low, high, backend in layer["ranges"]:
                if low <= labels["M"] <= high:
                    return str(backend)
    raise AssertionError(labels)


def test_the_front_page_is_short() -> None:
    assert len(README.splitlines()) <= 130


def test_the_kernel_on_the_front_page_is_the_one_that_new_kernel_writes() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert block in (ROOT / "workspace/new_kernel/templates/gemm/triton.py").read_text()


def test_the_size_of_the_fork_is_as_said() -> None:
    page = " ".join((ROOT / "vllm-fork" / "README.md").read_text().split())
    assert "the same two patches" in page
    for version in load().vllm.release:
        patches = sorted((PATCHES / version).glob("*.patch"))
        lines = [
            line
            for patch in patches
            for line in patch.read_text().splitlines()
            if re.match(r"\+(?!\+\+)", line)
        ]
        assert f"{len(lines)} lines for {version}" in page
        for number in range(1, len(patches) + 1):
            assert f"| {number:04d} |" in page


# --- transcripts: a block that begins with a command, and what the code prints --------------------

TRANSCRIPTS = {
    command: lines.splitlines()
    for page in PAGES
    for command, lines in re.findall(
        r"^```\n\$ (make [^\n]*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL
    )
}


def test_every_transcript_is_compared_here() -> None:
    assert set(TRANSCRIPTS) == {"make bench", "make doctor", "make fork-status"}


def printed(shown: record.Record, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that a bench prints of its record."""
    lines = io.StringIO()
    monkeypatch.setattr(
        report, "console",
        Console(file=lines, highlight=False, soft_wrap=True, width=80, color_system=None),
    )  # fmt: skip
    path = BENCHMARKS / "results" / f"{shown.run}.json"
    report.show(shown, path, path.with_suffix(".png"))
    return [line.rstrip() for line in lines.getvalue().splitlines()]


def test_the_transcript_of_a_bench_is_what_its_record_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = record.read(BENCHMARKS / "engine" / "tiny-qwen2-throughput-cpu.json")
    lines = printed(shown, monkeypatch)
    # What is before it tells how far a run is, and how long that took.
    assert TRANSCRIPTS["make bench"][-len(lines) :] == lines


@pytest.mark.parametrize(("name", "backend"), FIRST_KERNELS.items())
def test_the_pages_on_a_first_kernel_show_what_records_show(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / f"first-kernel-{name}.md").read_text()
    engine = record.read(BENCHMARKS / "engine" / f"qwen2.5-0.5b-{backend}-h200.json")
    assert "\n".join([f"$ {engine.command}", "…", *printed(engine, monkeypatch)]) in page
    kernels = json.loads((BENCHMARKS / "kernels" / "gemm-h200.json").read_text())
    quoted = re.findall(r"^\| (\w+) \| (\d+) \| [\d.]+ \|.*\|$", page, re.MULTILINE)
    assert len(quoted) == 6
    for layer, tokens in quoted:
        labels = {"model": "qwen2.5-7b", "layer": layer, "M": int(tokens)}
        (found,) = [row for row in kernels["rows"] if labels.items() <= row["labels"].items()]
        torch, ours = (found["contenders"][one] for one in ("torch", backend))
        assert (
            f"| {layer} | {tokens} | {torch['us']:.2f} | {ours['us']:.2f} | {ours['ratio']:.3f} "
            f"[{ours['low']:.3f}, {ours['high']:.3f}] | {ours['verdict'].lower()} |"
        ) in page


def without_this_machine(text: str) -> str:
    """What doctor says of a row, less the versions and numbers of one machine."""
    text = re.sub(r" \([^()]*\d[^()]*\) [\d.]+$", "", text)  # a distribution's g++
    # The pinned architectures: a checkout may compile for fewer.
    text = re.sub(r" \([\d., a]+\)| for [\d., a]+$", "", text)
    return re.sub(r"_C\w*\.abi3|\d+(?:\.\d+)*", "N", text)


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="it is of the default environment")
def test_the_transcript_of_doctor_has_the_rows_that_doctor_has(
    doctors_rows: list[doctor.Check],
) -> None:
    rows: list[tuple[str, str, str]] = []
    for line in TRANSCRIPTS["make doctor"][1:-2]:
        mark, name, state = line[:1], line[3:15].strip(), line[17:].strip()
        if not name:  # the row before goes on
            mark, name, before = rows.pop()
            state = f"{before} {state}"
        rows.append((mark, name, state))
    assert [name for _, name, _ in rows] == [row.name for row in doctors_rows]
    # The lock holds a few packages for some machines and Pythons only.
    shown = re.match(r"3\.\d+", rows[0][2])
    as_shown = shown and shown[0] == ".".join(platform.python_version_tuple()[:2])
    as_shown = as_shown and platform.machine() == "x86_64"
    for (mark, name, state), row in zip(rows, doctors_rows, strict=True):
        if name == "packages" and as_shown:
            count = len(locked(lock_files(load().vllm.default, "cpu")))
            assert state == f"all {count} at their locked versions"
        # What is otherwise on this machine (a GPU) or in this checkout (local commits, a build of
        # vLLM) has other words.
        elif doctor.MARKS[row.status] == mark and name not in ("GPU", "binaries"):
            assert without_this_machine(row.detail) == without_this_machine(state)


def test_the_transcript_of_fork_status_is_what_it_prints_of_our_patches() -> None:
    lines = TRANSCRIPTS["make fork-status"]
    version = load().vllm.default
    (commit,) = (line.strip() for line in lines if re.match(r" +[0-9a-f]{7} ", line))
    found = status.Status(
        release=version,
        tree=f"vllm-fork/releases/{version}",
        shown_by_src=True,
        branch="main",
        patches=status.queue(version),
        patches_applied=True,
        own_commits=[commit],
        uncommitted=[],
        rebase=None,
        other_releases=[],
    )
    assert list(status.table(found)) == lines
