# SPDX-License-Identifier: Apache-2.0
"""How long a run still takes: estimated at first, then from the durations measured so far."""

from collections.abc import Mapping, Sequence

from workspace.bench.messages import STAGES, Event, Stage, repetitions


class TimeLeft:
    """Follows the steps of all processes of a run, one process after the other.

    Args:
        expected: seconds by stage, of one round where a stage has rounds; may be empty.
        rounds: measured rounds of a process.
        order: the variants of the processes.
        stages: what a process does, in this order.

    All times are seconds of any one clock.
    """

    def __init__(
        self,
        expected: Mapping[Stage, float],
        rounds: int,
        order: Sequence[str],
        stages: Sequence[Stage] = STAGES,
    ) -> None:
        self.rounds = rounds
        self._stages = stages
        self._latest = dict(expected)
        self._measured: dict[tuple[str, Stage], float] = {}
        self._order = list(order)
        self._now = Event(stage=stages[0])
        self._since = 0.0

    def start(self, time: float) -> None:
        """The next process starts, and with it its first step."""
        self._now, self._since = Event(stage=self._stages[0]), time

    def step(self, event: Event, time: float) -> None:
        """A step begins, and the one before it ends."""
        if event != self._now:
            self._ended(time)
            self._now, self._since = event, time

    def end(self, time: float) -> None:
        """The process has ended."""
        self._ended(time)
        del self._order[0]
        self.start(time)

    def left(self, time: float) -> float | None:
        """Seconds until all processes have ended; None while unknown."""
        elapsed = time - self._since
        total = 0.0
        for index, variant in enumerate(self._order):
            begin = 0 if index else self._stages.index(self._now.stage)
            for stage in self._stages[begin:]:
                seconds = self.of_stage(variant, stage)
                repeats = repetitions(stage, self.rounds)
                if index == 0 and stage == self._now.stage:
                    repeats = max(0, repeats - self._now.number) if self._now.number else 0
                    # The current step may take longer than it did before.
                    seconds = None if seconds is None else max(seconds, elapsed)
                    total += (seconds or 0.0) - elapsed
                if seconds is None:
                    return None
                total += repeats * seconds
        return total

    def of_stage(self, variant: str, stage: Stage) -> float | None:
        """Seconds of this stage in a process of this variant; None if unknown."""
        return self._measured.get((variant, stage), self._latest.get(stage))

    def _ended(self, time: float) -> None:
        stage = self._now.stage
        self._latest[stage] = self._measured[self._order[0], stage] = time - self._since
