# SPDX-License-Identifier: Apache-2.0
"""The key figures of a kernel launch, and how they are read from ncu's raw page."""

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass

from custom_kernels.profile.source import Line

_STALL = re.compile(r"^smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio$")
_SECTORS = "l1tex__t_sectors_pipe_lsu_mem_global_op_{}.sum"
_REQUESTS = "l1tex__t_requests_pipe_lsu_mem_global_op_{}.sum"
_SHARED_PASSES = "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum"
_SHARED_LOADS = "smsp__sass_inst_executed_op_shared_ld.sum"
_TENSOR = re.compile(r"pipe_tensor\w*\.avg\.pct_of_peak_sustained_(?:active|elapsed)$")
_LIMIT = "launch__occupancy_limit_"
_LIMITS = {
    "blocks": "blocks per SM",
    "registers": "registers",
    "shared_mem": "shared memory",
    "warps": "threads per block",
    "barriers": "barriers",
}
"""What keeps more blocks from an SM: the end of ncu's name, and ours."""


@dataclass(frozen=True)
class Profile:
    """The key figures of one kernel launch; None for what this ncu or GPU does not count."""

    kernel: str
    microseconds: float | None
    dram_percent: float | None
    """Of the peak bandwidth that ncu knows, not of a measured copy."""
    sm_percent: float | None
    tensor_percent: float | None
    """Of the busiest tensor pipe, while the SMs were active."""
    l1_percent: float | None
    """Of what L1 and shared memory can move, while the SMs were active."""
    l2_percent: float | None
    dram_bytes: float | None
    """Read plus written."""
    load_sectors: float | None
    """Sectors of 32 bytes per request of a warp that loads from global memory."""
    store_sectors: float | None
    shared_load_passes: float | None
    """Passes through shared memory per load of a warp, bank conflicts included."""
    occupancy: float | None
    """Achieved, percent of the warps an SM can hold."""
    occupancy_limit: float | None
    """Theoretical, by the resources of a block."""
    registers: float | None
    shared_bytes: float | None
    stalls: tuple[tuple[str, float], ...]
    """The reasons for which warps waited, the longest first, and their share of the time between
    two instructions of a warp, percent."""
    grid: str | None = None
    block: str | None = None
    waves: float | None = None
    """Blocks of the grid, over those that the GPU holds at once."""
    limited_by: tuple[str, ...] = ()
    """The resources that allow the fewest blocks on an SM."""
    no_eligible_percent: float | None = None
    """Cycles in which a scheduler had no warp that could issue, of those with warps."""
    sm_mhz: float | None = None
    memory_mhz: float | None = None
    lines: tuple[Line, ...] = ()
    """The source lines with most stall samples, the most first."""


def parse(raw: str) -> list[Profile]:
    """The key figures from ``ncu --page raw --csv --print-units base``: a header, a line of units,
    then a line per kernel."""
    lines = raw.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))
    return [_figures(row) for row in rows if row["ID"]]


def _figures(row: dict[str, str]) -> Profile:
    figures = {name: value for name, text in row.items() if (value := _number(text)) is not None}
    of_peak = "avg.pct_of_peak_sustained_elapsed"
    tensor = [value for name, value in figures.items() if _TENSOR.search(name)]
    return Profile(
        kernel=row["Kernel Name"],
        microseconds=_scaled(figures.get("gpu__time_duration.sum"), 1e-3),
        dram_percent=figures.get(
            f"gpu__dram_throughput.{of_peak}", figures.get(f"dram__throughput.{of_peak}")
        ),
        sm_percent=figures.get(f"sm__throughput.{of_peak}"),
        tensor_percent=max(tensor, default=None),
        l1_percent=figures.get("l1tex__throughput.avg.pct_of_peak_sustained_active"),
        l2_percent=figures.get(f"lts__throughput.{of_peak}"),
        dram_bytes=_sum(figures, "dram__bytes_read.sum", "dram__bytes_write.sum"),
        load_sectors=_ratio(figures, _SECTORS.format("ld"), _REQUESTS.format("ld")),
        store_sectors=_ratio(figures, _SECTORS.format("st"), _REQUESTS.format("st")),
        shared_load_passes=_ratio(figures, _SHARED_PASSES, _SHARED_LOADS),
        occupancy=figures.get("sm__warps_active.avg.pct_of_peak_sustained_active"),
        occupancy_limit=figures.get("sm__maximum_warps_per_active_cycle_pct"),
        registers=figures.get("launch__registers_per_thread"),
        shared_bytes=figures.get("launch__shared_mem_per_block"),
        stalls=_stalls(figures),
        grid=_extent(row.get("Grid Size")),
        block=_extent(row.get("Block Size")),
        waves=figures.get("launch__waves_per_multiprocessor"),
        limited_by=_limits(figures),
        no_eligible_percent=figures.get("smsp__issue_inst0.avg.pct_of_peak_sustained_active"),
        sm_mhz=_scaled(figures.get("sm__cycles_elapsed.avg.per_second"), 1e-6),
        memory_mhz=_scaled(figures.get("dram__cycles_elapsed.avg.per_second"), 1e-6),
    )


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _sum(figures: Mapping[str, float], *names: str) -> float | None:
    values = [figures[name] for name in names if name in figures]
    return sum(values) if len(values) == len(names) else None


def _ratio(figures: Mapping[str, float], above: str, below: str) -> float | None:
    if above not in figures or not figures.get(below):
        return None
    return figures[above] / figures[below]


def _stalls(figures: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    cycles = {match[1]: value for name, value in figures.items() if (match := _STALL.match(name))}
    total = sum(cycles.values())
    cycles.pop("selected", None)  # the warp that issues does not wait
    worst = sorted(cycles.items(), key=lambda item: -item[1])
    return tuple((name.replace("_", " "), 100 * value / total) for name, value in worst if value)


def _limits(figures: Mapping[str, float]) -> tuple[str, ...]:
    blocks = {
        name: figures[_LIMIT + suffix]
        for suffix, name in _LIMITS.items()
        if _LIMIT + suffix in figures
    }
    return tuple(name for name, count in blocks.items() if count == min(blocks.values()))


def _extent(text: str | None) -> str | None:
    """``(117, 2, 1)`` as ``117 x 2``."""
    sizes = re.findall(r"\d+", (text or "").replace(",", " "))
    while len(sizes) > 1 and sizes[-1] == "1":
        sizes.pop()
    return " x ".join(sizes) or None


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None
