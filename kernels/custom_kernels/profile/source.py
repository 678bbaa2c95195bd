# SPDX-License-Identifier: Apache-2.0
"""The source lines at which warps waited, as ncu sampled them.

A few thousand times per millisecond ncu notes for a warp which instruction comes next and why it
has not been issued. Compilers note the source line of each instruction: nvcc and NVRTC with
``-lineinfo``, Triton by itself.
"""

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from custom_kernels import paths

MOST_LINES = 10
LEAST = 0.005
"""Share of all stalls under which a line is left out."""

_REASON = re.compile(r"^(?:stall_|smsp__pcsamp_warps_issue_stalled_)(\w+)$")
_NO_STALL = {"selected", "not_selected"}
"""Reasons of warps that could issue: this one did, or another one did."""
_NAMES = {
    "dispatch": "dispatch stall",
    "imc": "imc miss",
    "lg": "lg throttle",
    "long_sb": "long scoreboard",
    "math": "math pipe throttle",
    "mio": "mio throttle",
    "no_inst": "no instruction",
    "no_instructions": "no instruction",
    "short_sb": "short scoreboard",
    "sleep": "sleeping",
    "tex": "tex throttle",
}
"""ncu's short names of reasons, where they differ from those of its figures per kernel."""


@dataclass(frozen=True)
class Line:
    """One line of source, and the stalls of its instructions."""

    file: str
    """Relative to the checkout, if it is in it."""
    number: int
    share: float
    """Of the stall samples of all lines of this launch, percent."""
    reason: str
    """The most frequent one."""
    text: str


def parse(page: str) -> tuple[Line, ...]:
    """The lines with most stall samples, the most first, from
    ``ncu --page source --csv --print-source cuda,sass`` of one launch.

    For each source file the page has a row with its path, one with the function, a header, then
    for each line a row with the sums over its instructions, which follow in rows without a number.
    Empty if the kernel has no line information.
    """
    samples: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    texts: dict[tuple[str, int], str] = {}
    file = ""
    header: list[str] = []
    reasons: dict[int, str] = {}
    for row in csv.reader(io.StringIO(page)):
        match row:
            case ["File Path" | "File Name", path, *_]:
                file = path
            case ["Line No", *_]:
                header = row
                reasons = _reasons(header)
            case [number, text, *_] if number.isdigit() and len(row) == len(header):
                at = (file, int(number))
                texts[at] = text.strip()
                for i, reason in reasons.items():
                    samples[at][reason] += _count(row[i])
    total = sum(map(Counter.total, samples.values()))
    worst = sorted(samples, key=lambda at: -samples[at].total())[:MOST_LINES]
    return tuple(
        Line(
            file=_shown(at[0]),
            number=at[1],
            share=100 * samples[at].total() / total,
            reason=samples[at].most_common(1)[0][0],
            text=texts[at],
        )
        for at in worst
        if samples[at].total() > LEAST * total
    )


def _reasons(header: Sequence[str]) -> dict[int, str]:
    """The columns that count the samples with one reason for a stall."""
    found = {i: match[1] for i, name in enumerate(header) if (match := _REASON.match(name))}
    return {
        i: _NAMES.get(name, name.replace("_", " "))
        for i, name in found.items()
        # Besides all samples there are those of cycles in which the scheduler issued nothing.
        if name not in _NO_STALL and not name.endswith("_not_issued")
    }


def _count(text: str) -> int:
    return int(text.replace(",", "")) if text[:1].isdigit() else 0


def _shown(file: str) -> str:
    """A file of the checkout from its root, as an editor's terminal opens it; of another, and of a
    RawKernel in its temporary folder, the name."""
    root = paths.checkout()
    path = Path(file)
    if root is not None and path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return path.name
