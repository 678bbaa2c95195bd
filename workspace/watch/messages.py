# SPDX-License-Identifier: Apache-2.0
"""Messages between the watch and its fork servers.

They travel pickled (`multiprocessing.connection`). Standard library only: the fork server must not
import anything for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from custom_kernels.inspect.report import Report


@dataclass(frozen=True)
class FindDevice:
    """Which GPU is there?"""

    timeout: float
    """Seconds; as in every question."""


@dataclass(frozen=True)
class Inspect:
    """Compile a backend for one architecture and read the result."""

    operation: str
    backend: str
    architecture: str
    timeout: float


@dataclass(frozen=True)
class Shapes:
    """The shapes of a capture that are timed."""

    file: str
    top: int
    """So many, those that cost most."""


@dataclass(frozen=True)
class Check:
    """Check a backend against its reference; on a GPU, if it is right, time it."""

    operation: str
    backend: str
    on_gpu: bool
    timeout: float
    shapes: Shapes | None = None
    """None: one case with few tokens and one with many."""


@dataclass(frozen=True)
class Ready:
    """Everything is imported."""


@dataclass(frozen=True)
class Started:
    """A child works on the question; its process id is that of its process group, too."""

    child: int


@dataclass(frozen=True)
class FoundDevice:
    """Name and architecture of the GPU; None without one."""

    gpu: str | None = None
    architecture: str | None = None


@dataclass(frozen=True)
class Inspected:
    """What was compiled."""

    reports: tuple[Report, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Timing:
    """One timed case: microseconds, the ratio to a baseline, or why it could not be timed."""

    microseconds: float | None
    ratio: float | None
    baseline: str | None
    failure: str | None
    calls: int | None = None
    """In the run that was captured."""


@dataclass(frozen=True)
class Checked:
    """How many cases were checked, the wrong ones, and the times by case."""

    cases: int
    wrong: tuple[str, ...]
    times: dict[str, Timing] = field(default_factory=dict)
    summary: tuple[str, ...] = ()
    """Of the times at captured shapes."""


@dataclass(frozen=True)
class NotChecked:
    """The backend cannot run here."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """An exception: of the compiler, or of the kernel's Python."""

    message: str


@dataclass(frozen=True)
class Crashed:
    """The child ended without an answer, or hung and was killed."""

    state: Literal["crashed", "hangs"]
    message: str


Question = FindDevice | Inspect | Check
Answer = FoundDevice | Inspected | Checked | NotChecked | Failed | Crashed
