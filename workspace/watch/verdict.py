# SPDX-License-Identifier: Apache-2.0
"""The verdict on one version of a backend, from the answers of the fork servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from workspace.watch.messages import Answer, Checked, Crashed, Failed, Inspected, NotChecked, Timing

if TYPE_CHECKING:
    from custom_kernels.inspect.report import Report

State = Literal["right", "compiled", "wrong", "does not compile", "crashed", "hangs"]
"""`compiled`: it could not be run here."""
SHOWN_FAILURES = 3


@dataclass(frozen=True)
class Verdict:
    """One version of one backend."""

    number: int
    backend: str
    state: State
    seconds: float
    """From the save to the verdict; for the first version, of the work."""
    details: tuple[str, ...] = ()
    """What is wrong, in the words of the compiler or the check."""
    remarks: tuple[str, ...] = ()
    reports: tuple[Report, ...] = ()
    times: dict[str, Timing] = field(default_factory=dict)


def judge(
    number: int, backend: str, inspected: Answer, checked: Answer | None, seconds: float
) -> Verdict:
    """The verdict.

    Args:
        number: of the version, from 1.
        inspected: the answer to `Inspect`.
        checked: the answer to `Check`; None if the backend cannot run without a GPU.
        seconds: from the save until now.
    """
    state: State = "compiled"
    details: list[str] = []
    remarks: list[str] = []
    reports: tuple[Report, ...] = ()
    times: dict[str, Timing] = {}
    match inspected:
        case Crashed():
            state = inspected.state
            details.append(f"while compiling: {inspected.message}")
        case Failed():
            state = "does not compile"
            details.append(inspected.message)
        case Inspected():
            reports = inspected.reports
            remarks += inspected.warnings
    match checked:
        case Crashed() if state != "does not compile":
            state = checked.state
            details.append(f"while checking: {checked.message}")
        case Failed() if state == "compiled":
            state = "crashed"
            details.append(checked.message)
        case Checked() if state == "compiled":
            state = "wrong" if checked.wrong else "right"
            details += checked.wrong[:SHOWN_FAILURES]
            if len(checked.wrong) > SHOWN_FAILURES:
                details.append(f"… {len(checked.wrong)} of {checked.cases} cases are wrong")
            times = checked.times
            if not checked.wrong:
                remarks.insert(0, f"{checked.cases} cases right")
            remarks += checked.summary
        case NotChecked():
            remarks.append(f"not run: {checked.reason}")
        case None if state == "compiled":
            remarks.append("compiled only: it cannot run without a GPU")
    return Verdict(number, backend, state, seconds, tuple(details), tuple(remarks), reports, times)
