# SPDX-License-Identifier: Apache-2.0
"""One fault after the other: scene, fault, checks, the same command again, comparison."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.kills import faults, scene
from tests.kills.cases import CASES, Case, commit_edits
from tests.kills.faults import Ended
from tests.workspace.conftest import Checkout

Kind = Literal["kill", "full", "read-only"]
KINDS: tuple[Kind, ...] = ("kill", "full", "read-only")
MOST_IN_A_ROW = 8
"""What a killed run left must not mislead the next one, which is killed, too."""
CLEAR = re.compile(r"space left|free some|Read-only file system|make room", re.IGNORECASE)


class Fault(Exception):
    """A promise that was not kept."""


@dataclass
class Start:
    """The state from which a case starts, and what its undisturbed run takes and leaves."""

    saved: Path
    work: scene.Work
    before: dict[str, str]
    after: dict[str, str]
    varying: set[str]
    seconds: float
    bytes: int = 0


@dataclass
class Runner:
    """Runs faults in one scene.

    Args:
        checkout: the scene as `scene.make_checkout` makes it.
        folder: for copies of it.
        tell: called with a line of progress.
    """

    checkout: Checkout
    folder: Path
    tell: Callable[[str], None] = print
    counts: Counter[tuple[str, Kind]] = field(default_factory=Counter)
    found: list[str] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)
    _starts: dict[str, Start] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = self.folder / "base"
        scene.copy(self.checkout.root, self.base)

    # --- a case -----------------------------------------------------------------------------

    def start(self, case: Case) -> Start:
        """Prepare the state, once, and see twice what an undisturbed run makes of it."""
        if case.name in self._starts:
            return self._starts[case.name]
        self._put(self.base)
        if not case.edits:
            commit_edits(self.checkout)
        case.prepare(self.checkout)
        saved = self.folder / f"start-{len(self._starts)}"
        scene.copy(self.checkout.root, saved)
        work, before = scene.work(self.checkout.root), scene.results(self.checkout.root)
        seen = []
        for _ in range(2):
            self._put(saved)
            first = self._run(case)
            self._regular(case, first)
            if case.again:
                self._regular(case, self._run(case, case.again))
            seen.append((first.seconds, scene.results(self.checkout.root)))
        (_, one), (seconds, two) = seen
        varying = {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}
        made = Start(saved, work, before, two, varying, seconds)
        self._starts[case.name] = made
        return made

    def round(self, case: Case, kind: Kind, seed: int) -> int:
        """Faults of one kind, and the run that ends well; how many faults there were."""
        began, generator = time.monotonic(), random.Random(seed)
        start, what, count = self.start(case), "", 0
        self._put(start.saved)
        try:
            if kind == "kill":
                for _ in range(generator.randint(1, MOST_IN_A_ROW)):
                    delay = faults.moment(start.seconds, generator)
                    command, env = case.command(self.checkout), self.checkout.env
                    count += faults.killed(command, self.checkout.root, env, delay)
                    what = f"killed after {delay:.3f} of {start.seconds:.1f} s"
                    self._check(case, start)
                self._finish(case, start)
            else:
                delay = faults.moment(start.seconds, generator)
                # The first steps of a run write little.
                room = int(generator.random() ** 2 * self._needed(case, start))
                what = f"read-only after {delay:.3f} of {start.seconds:.1f} s"
                what = what if kind == "read-only" else f"a disk with room for {room} bytes"
                with faults.small_disk(self.checkout.root) as disk:
                    count = 1
                    ended = self._disk_fault(case, kind, delay, disk, room)
                    self._check(case, start)
                    self._one_clear_error(case, ended)
                    self._finish(case, start)
        except Fault as fault:
            repeat = f"--cases '{case.name}' --kinds {kind} --seed {seed} --faults 1"
            line = f"{case.name}, {what}: {fault}; repeat: python -m tests.kills {repeat}"
            self.found.append(line)
            self.tell(line)
        self.counts[case.name, kind] += count
        self.spent[case.name] = self.spent.get(case.name, 0) + time.monotonic() - began
        return count

    def _disk_fault(self, case: Case, kind: Kind, delay: float, disk: Path, room: int) -> Ended:
        command, root, env = case.command(self.checkout), self.checkout.root, self.checkout.env
        if kind == "read-only":
            return faults.read_only(command, root, env, delay)
        with faults.full(disk, room):
            return self._run(case)

    def _needed(self, case: Case, start: Start) -> int:
        """Bytes that an undisturbed run writes."""
        if not start.bytes:
            with faults.small_disk(self.checkout.root) as disk:
                empty = faults.used(disk)
                self._run(case)
                start.bytes = faults.used(disk) - empty
        return start.bytes

    # --- checks -----------------------------------------------------------------------------

    def _check(self, case: Case, start: Start) -> None:
        """Nothing of the user's is lost, and no file has its name and not its content."""
        root = self.checkout.root
        for line in scene.lost(root, start.work):
            raise Fault(line)
        for name, digest in scene.results(root).items():
            expected = {start.before.get(name), start.after.get(name)}
            if digest in expected or scene.unfinished(root, name) or digest == "unfinished":
                continue
            if not (root / name).is_file() or scene.half(root / name):
                raise Fault(f"{name} is neither what it was nor what it becomes")

    def _finish(self, case: Case, start: Start) -> None:
        """The same command ends well, and leaves what an undisturbed run leaves."""
        ended = self._run(case, case.again)
        if not (case.done and case.done in ended.output):
            self._regular(case, ended)
        self._check(case, start)
        root = self.checkout.root
        after = scene.results(root)
        for name in sorted(after.keys() | start.after.keys()):
            if name in start.varying or name.startswith(case.varies):
                continue
            if after.get(name) != start.after.get(name):
                how = "missing" if name not in after else "another"
                if name not in start.after:
                    if scene.unfinished(root, name) and not name.startswith("vllm-fork/"):
                        continue  # ignored by git, gone with the next `make clean`
                    how = "left over"
                raise Fault(f"in the end {name} is {how}")

    def _regular(self, case: Case, ended: Ended) -> None:
        last = " | ".join(ended.output.strip().splitlines()[-4:])
        if case.stops and not case.again:
            if case.stops not in ended.output:
                raise Fault(f"it does not stop with {case.stops!r}, but says: {last}")
        elif ended.status:
            raise Fault(f"run again, it fails: {last}")

    def _one_clear_error(self, case: Case, ended: Ended) -> None:
        if ended.status == 0 or (case.stops and case.stops in ended.output):
            return  # nothing more was written
        lines = ended.output.splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        if len(errors) != 1 or "Traceback" in ended.output:
            raise Fault(f"not one error: {' | '.join(lines[-6:])}")
        if not CLEAR.search(errors[0]):
            raise Fault(f"not clear: {errors[0]}")

    # --- steps ------------------------------------------------------------------------------

    def _run(self, case: Case, words: tuple[str, ...] = ()) -> Ended:
        return faults.run(case.command(self.checkout, words), self.checkout.root, self.checkout.env)

    def _put(self, saved: Path) -> None:
        shutil.rmtree(self.checkout.root)
        scene.copy(saved, self.checkout.root)


def spread(
    runner: Runner, cases: list[Case], kinds: list[Kind], count: int, seed: int
) -> Iterator[int]:
    """At least so many faults, the next always for the case that had the least time; yields how
    many there were so far."""
    done = rounds = 0
    while done < count:
        case = min(cases, key=lambda one: runner.spent.get(one.name, 0.0))
        kind = random.Random(seed + rounds).choice(kinds)
        done += runner.round(case, kind, seed + rounds)
        rounds += 1
        yield done


def chosen(names: list[str], *, slow: bool) -> list[Case]:
    """Cases by their names or verbs, without names all; slow ones by name or on demand."""
    named = [case for case in CASES if not names or case.name in names or case.verb in names]
    return [case for case in named if slow or not case.slow or case.name in names]
