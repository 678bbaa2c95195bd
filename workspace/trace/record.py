# SPDX-License-Identifier: Apache-2.0
"""The record of `make trace`."""

from typing import Literal

from workspace.bench.record import DeviceKind, ModelRecord, Provenance, Strict
from workspace.trace.timeline import Phase


class Row(Strict):
    """A kernel (on a CPU an op) in one part of the model, per step: calls and their µs in all.

    `roofline_us` is the least that these calls could take on this machine, by the bytes that they
    must move and the operations that they must do; known of linear layers on a GPU.
    """

    part: str
    kernel: str
    calls: float
    us: float
    roofline_us: float | None = None


class PhaseRecord(Strict):
    """The steps of one phase. `us`, the median, is from a step's first kernel to that of the next
    one, of which the device is busy `busy_us`; in the rest, the gaps, it waits. Rows are means."""

    phase: Phase
    steps: int
    requests: float
    tokens: float
    us: float
    fastest_us: float
    slowest_us: float
    busy_us: float
    attributed: float
    """Share of the busy time that belongs to a part."""
    rows: list[Row]

    @property
    def gaps_us(self) -> float:
        return max(0.0, self.us - self.busy_us)

    def parts(self) -> dict[str, float]:
        """µs of each part, the longest first."""
        total: dict[str, float] = {}
        for row in self.rows:
            total[row.part] = total.get(row.part, 0.0) + row.us
        return dict(sorted(total.items(), key=lambda one: -one[1]))


class SideRecord(Strict):
    """One variant; `traces` has the file of each worker, `phases` are of the first of them.

    The same round took `untraced_s` before, and `traced_s` under the profiler.
    """

    name: str
    arguments: list[str]
    environment: dict[str, str]
    traces: list[str]
    launches: dict[int, dict[str, int]]
    untraced_s: float
    traced_s: float
    phases: list[PhaseRecord]


class Record(Strict):
    """One run of `make trace`. One that is not `valid` has `failures`, and must not be used."""

    schema_version: Literal[1] = 1
    run: str
    started: str
    duration_s: float
    valid: bool
    failures: list[str]
    command: str
    model: ModelRecord
    device: str
    device_kind: DeviceKind
    tensor_parallel: int
    eager: bool
    bytes_per_second: float | None
    flops_per_second: dict[str, float]
    sides: list[SideRecord]
    provenance: Provenance
