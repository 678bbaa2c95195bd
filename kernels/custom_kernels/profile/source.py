# SPDX-License-Identifier: Apache-2.0
"""The source lines at which warps waited, as ncu sampled them.

Again and again while the kernel runs, ncu notes which instruction of a warp comes next and why it
has not been issued. Compilers note the source line of each instruction: nvcc and NVRTC with
``-lineinfo``, Triton by itself.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from custom_kernels import paths

MOST_LINES = 10
LEAST = 0.005
"""Share of all stalls under which a line is left out."""

NO_TEXT = "<Unable to open source file>"
"""What ncu prints for a line whose file it did not find."""

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
    """One line of source, and the stalls of its instructions, inlined ones included."""

    file: str
    """Relative to the checkout, if it is in it."""
    number: int
    share: float
    """Of the stall samples of the launch, percent. An instruction that is inlined belongs to its
    own line and to those that call it, so shares can add up to more than 100."""
    reason: str
    """The most frequent one."""
    text: str


def parse(page: str) -> tuple[Line, ...]:
    """The lines with most stall samples, the most first, from
    ``ncu --page source --csv --print-source cuda,sass`` of one launch.

    For each source file the page has a row with its path, one with the function, a header, then
    for each line a row with the sums over its instructions, which follow in rows with an address
    in place of the number. Empty if the kernel has no line information.
    """
    lines: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    texts: dict[tuple[str, int], str] = {}
    instructions: dict[str, int] = {}
    file, columns = "", 0
    reasons: dict[int, str] = {}
    for row in map(_fields, page.split("\n")):
        match row:
            case ["File Path" | "File Name", *rest]:
                file = rest[0]
            case ["Line No", *_]:
                columns, reasons = len(row), _reasons(row)
            case ["", "", address, *_] if address.startswith("0x"):
                instructions[address] = sum(_stalls(row, reasons).values())
            case [number, *_] if number.isdigit() and len(row) >= columns > 0:
                at = file, int(number)
                lines[at] += _stalls(row, reasons)
                texts[at] = '","'.join(row[1 : len(row) - columns + 2]).strip()
    total = sum(instructions.values())
    worst = sorted(lines, key=lambda at: -lines[at].total())
    kept = [at for at in worst if at[1] and lines[at].total() > LEAST * total]  # 0: of no line
    return tuple(
        Line(
            file=_shown(at[0]),
            number=at[1],
            share=100 * lines[at].total() / total,
            reason=lines[at].most_common(1)[0][0],
            text="" if texts[at] == NO_TEXT else texts[at],
        )
        for at in kept[:MOST_LINES]
    )


def _fields(row: str) -> list[str]:
    """The fields of a row. ncu does not escape the quotes in a line of source, so that it may be
    torn into several fields; those after it are counted from the end."""
    return row.rstrip(",").removeprefix('"').removesuffix('"').split('","')


def _stalls(row: Sequence[str], reasons: Mapping[int, str]) -> Counter[str]:
    return Counter({reason: _count(row[place]) for place, reason in reasons.items()})


def _reasons(header: Sequence[str]) -> dict[int, str]:
    """The columns, from the end, that count the samples with one reason for a stall."""
    found = {}
    for place, column in enumerate(header, -len(header)):
        match = _REASON.match(column)
        # Besides all samples there are those of cycles in which the scheduler issued nothing.
        if match and match[1] not in _NO_STALL and not match[1].endswith("_not_issued"):
            found[place] = _NAMES.get(match[1], match[1].replace("_", " "))
    return found


def _count(text: str) -> int:
    return int(text.replace(",", "")) if text[:1].isdigit() else 0


def _shown(file: str) -> str:
    """A source of the checkout from its root, as an editor's terminal opens it. Of one elsewhere,
    of an installed package and of a RawKernel in its temporary folder, the name."""
    root = paths.checkout()
    path = Path(file)
    if root is not None and path.is_relative_to(root):
        path = path.relative_to(root)
        if not path.parts[0].startswith("."):
            return path.as_posix()
    return path.name
