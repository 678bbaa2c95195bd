# SPDX-License-Identifier: Apache-2.0
"""What a person reads: figures, what bounds the kernel, where its warps wait, what changed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from custom_kernels.profile.figures import Profile
from custom_kernels.profile.records import Recorded

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

TOP_STALLS = 3
NEAR_PEAK = 60
"""Percent of its peak throughput from which on a unit bounds the kernel. Below it latency does:
ncu's own rules draw the line there, too."""

_COMPARED = (
    ("duration, µs", "microseconds", 2),
    ("DRAM, % of peak", "dram_percent", 1),
    ("L2, % of peak", "l2_percent", 1),
    ("L1 and shared memory, % of peak", "l1_percent", 1),
    ("SMs, % of peak", "sm_percent", 1),
    ("tensor cores, % of peak", "tensor_percent", 1),
    ("no warp could issue, % of cycles", "no_eligible_percent", 1),
    ("occupancy, %", "occupancy", 1),
    ("registers per thread", "registers", 0),
    ("shared memory per block, bytes", "shared_bytes", 0),
    ("SM clock, MHz", "sm_mhz", 0),
)
"""What two profiles are compared by: the name, the field, and its decimal places."""


def table(profiles: Sequence[Profile]) -> "Table":
    """A line per kernel that the call launched."""
    from rich.text import Text

    shown = _table()
    shown.add_column("kernel", overflow="ellipsis", no_wrap=True, max_width=44)
    for name in ("µs", "DRAM %", "SM %", "tensor %", "occupancy %", "regs", "shared"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("warps wait for")
    for one in profiles:
        limit = "" if one.occupancy_limit is None else f" of {one.occupancy_limit:.0f}"
        shown.add_row(
            Text(one.kernel),
            _number(one.microseconds, 2),
            _number(one.dram_percent),
            _number(one.sm_percent),
            _number(one.tensor_percent),
            _number(one.occupancy) + limit,
            _number(one.registers, 0),
            _number(one.shared_bytes, 0),
            ", ".join(f"{name} {share:.0f} %" for name, share in one.stalls[:TOP_STALLS]),
        )
    return shown


def bound(one: Profile) -> str:
    """What bounds a kernel: the unit that is nearest to its peak throughput, or latency if none is
    near."""
    memory, compute = _memory(one), one.sm_percent
    if not memory or compute is None:
        return "ncu counted too little to say what bounds the kernel"
    busiest = max(memory, key=lambda unit: memory[unit])
    if max(memory[busiest], compute) < NEAR_PEAK:
        waits = f"; warps mostly wait for {one.stalls[0][0]}" if one.stalls else ""
        return f"latency-bound: no unit reaches {NEAR_PEAK} % of its peak throughput{waits}"
    if compute > memory[busiest]:
        return f"compute-bound: the SMs are at {compute:.0f} % of their peak throughput"
    return f"memory-bound: {busiest} is at {memory[busiest]:.0f} % of its peak throughput"


def report(one: Profile) -> "Group":
    """All of one launch: its figures, the three that say what bounds it (memory, compute and
    latency), and the source lines at which its warps wait."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    lines = Text("no source lines: the kernel was compiled without line information")
    parts = [_figures(one), Text(bound(one)), "", _lines(one) if one.lines else lines, ""]
    heading = Text(one.kernel, style="bold")
    return Group(heading, *(Padding(part, (0, 0, 0, 2)) for part in parts))


def _figures(one: Profile) -> "Table":
    from rich.table import Table

    clock = "" if one.sm_mhz is None else f" at an SM clock of {one.sm_mhz:.0f} MHz"
    waves = "" if one.waves is None else f" ({one.waves:.2f} waves)"
    limit = ""
    if one.limited_by and one.occupancy_limit != 100:
        limit = f", limited by {' and '.join(one.limited_by)}"
    memory = ", ".join(f"{level} {share:.1f} %" for level, share in _memory(one).items())
    shown = Table.grid(padding=(0, 2))
    for name, text in (
        ("duration", f"{_number(one.microseconds, 2)} µs{clock}"),
        ("launch", f"grid {one.grid or 'n/a'}{waves}, block {one.block or 'n/a'}"),
        (
            "resources",
            f"{_number(one.registers, 0)} registers per thread, "
            f"{_number(one.shared_bytes, 0)} bytes of shared memory per block",
        ),
        (
            "occupancy",
            f"{_number(one.occupancy)} % of {_number(one.occupancy_limit)} % possible{limit}",
        ),
        ("memory", f"{memory or 'n/a'} of peak throughput"),
        (
            "compute",
            f"SMs {_number(one.sm_percent)} % of peak throughput, "
            f"tensor cores {_number(one.tensor_percent)} % while active",
        ),
        ("latency", f"in {_number(one.no_eligible_percent)} % of cycles no warp could issue"),
    ):
        shown.add_row(name, text)
    return shown


def _memory(one: Profile) -> dict[str, float]:
    """Percent of the peak throughput of each level."""
    levels = {"DRAM": one.dram_percent, "L2": one.l2_percent, "L1/shared": one.l1_percent}
    return {level: share for level, share in levels.items() if share is not None}


def difference(before: Profile, now: Profile) -> "Table":
    """Two profiles of one kernel, figure by figure."""
    shown = _table()
    shown.add_column("")
    for name in ("before", "now", "change"):
        shown.add_column(name, justify="right")
    for name, field, places in _COMPARED:
        old, new = getattr(before, field), getattr(now, field)
        if old is None and new is None:
            continue
        change = ""
        texts = _number(old, places), _number(new, places)
        if old is not None and new is not None and texts[0] != texts[1]:
            relative = field == "microseconds"
            change = f"{100 * (new / old - 1):+.1f} %" if relative else f"{new - old:+.{places}f}"
        shown.add_row(name, *texts, change)
    return shown


def against(last: Recorded | None, now: Recorded) -> "Group":
    """The difference to the last profile of the same kernel and case, if there is one."""
    from rich.console import Group
    from rich.text import Text

    if last is None:
        return Group(Text("no earlier profile of this kernel and case on this GPU model"))
    same = last.provenance.kernel_source_hash == now.provenance.kernel_source_hash
    sources = "the kernels' sources are the same" if same else "the kernels' sources changed"
    head = f"against the profile of {last.provenance.time}: {sources}"
    if len(last.profiles) != len(now.profiles):
        counts = f"{len(last.profiles)} kernels then, {len(now.profiles)} now"
        return Group(Text(f"{head}; {counts}: not compared"))
    pairs = zip(last.profiles.values(), now.profiles.values(), strict=True)
    return Group(Text(head), *(difference(before, one) for before, one in pairs))


def _lines(one: Profile) -> "Group":
    from rich.console import Group
    from rich.text import Text

    places = [f"{line.file}:{line.number}" for line in one.lines]
    width = max(map(len, places))
    reasons = max(len(line.reason) for line in one.lines)
    rows = [
        f"{line.share:5.1f} %  {line.reason:{reasons}}  {place:{width}}  {line.text}"
        for line, place in zip(one.lines, places, strict=True)
    ]
    # Not a table: what does not fit is to be cut from the code, never from the place.
    return Group(
        "stalls by source line", *(Text(row, "", overflow="ellipsis", no_wrap=True) for row in rows)
    )


def _table() -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)


def _number(value: float | None, places: int = 1) -> str:
    return "n/a" if value is None else f"{value:.{places}f}"
