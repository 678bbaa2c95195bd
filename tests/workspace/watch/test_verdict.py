# SPDX-License-Identifier: Apache-2.0
"""The verdict from the fork servers' answers, and the messages that carry them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from workspace.host.paths import ROOT
from workspace.watch.messages import Answer, Checked, Crashed, Failed, Inspected, NotChecked
from workspace.watch.verdict import judge

COMPILED = Inspected((), ("spills",))
ERROR = Failed("line 3: no such name")
CRASH = Crashed("crashed", "Aborted")


@pytest.mark.parametrize(
    ("inspected", "checked", "state", "details", "remarks"),
    [
        (COMPILED, Checked(2, ()), "right", (), ("2 cases right", "spills")),
        (COMPILED, Checked(2, ("M=1",)), "wrong", ("M=1",), ("spills",)),
        (
            COMPILED, Checked(5, tuple("abcd")), "wrong",
            ("a", "b", "c", "… 4 of 5 cases are wrong"), ("spills",),
        ),
        (
            COMPILED, None, "compiled",
            (), ("spills", "compiled only: it cannot run without a GPU"),
        ),
        (COMPILED, NotChecked("no GPU"), "compiled", (), ("spills", "not run: no GPU")),
        (COMPILED, ERROR, "crashed", (ERROR.message,), ("spills",)),
        (COMPILED, CRASH, "crashed", ("while checking: Aborted",), ("spills",)),
        (ERROR, Checked(2, ()), "does not compile", (ERROR.message,), ()),
        (ERROR, ERROR, "does not compile", (ERROR.message,), ()),
        # The compiler's error is the cause.
        (ERROR, CRASH, "does not compile", (ERROR.message,), ()),
        (CRASH, Checked(2, ()), "crashed", ("while compiling: Aborted",), ()),
        (COMPILED, Crashed("hangs", "killed"), "hangs", ("while checking: killed",), ("spills",)),
    ],
)  # fmt: skip
def test_the_verdict_is_the_first_thing_that_is_wrong(
    inspected: Answer,
    checked: Answer | None,
    state: str,
    details: tuple[str, ...],
    remarks: tuple[str, ...],
) -> None:
    verdict = judge(1, "toy.triton", inspected, checked, 0.5)
    assert (verdict.state, verdict.details, verdict.remarks) == (state, details, remarks)


def test_messages_need_the_standard_library_only() -> None:
    code = "import workspace.watch.messages"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=True)
