# SPDX-License-Identifier: Apache-2.0
"""The faults of `python -m tests.kills`, a few of them, in the order of one seed."""

from __future__ import annotations

import pytest

from tests.kills import cases, faults, runner, scene
from tests.kills.runner import Kind, Runner
from tests.workspace.conftest import KILLS, ODD
from workspace.pins.model import load
from workspace.pins.release import selected
from workspace.verbs import VERBS

SEED = 20260101
"""The same moments in each run of CI; by hand a run draws its own."""
QUICK = [case for case in cases.CASES if case.quick]


def test_every_verb_is_killed_or_has_a_reason_why_not() -> None:
    """A new verb has to be thought about."""
    killed = {case.verb for case in cases.CASES}
    assert killed | cases.LEFT_OUT.keys() == VERBS.keys()
    assert not killed & cases.LEFT_OUT.keys()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    if selected() != load().vllm.default:
        pytest.skip("the small checkout has the default release's packages, this environment not")
    folder = tmp_path_factory.mktemp("kills") / ODD
    folder.mkdir(parents=True)
    return Runner(scene.make_checkout(folder), folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", runner.KINDS)
def test_nothing_is_lost_and_the_same_command_ends_well(small: Runner, kind: Kind) -> None:
    try:
        for _ in runner.spread(small, QUICK, [kind], KILLS, SEED):
            pass
    except faults.Missing as missing:
        pytest.skip(f"needs the right to mount a file system: {missing}")
    assert small.found == []
