# SPDX-License-Identifier: Apache-2.0
"""One contender over rotating buffers: captured in a CUDA graph and replayed, or called."""

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from custom_kernels.check.case import Case, Contender
from custom_kernels.check.guards import kept_inputs
from custom_kernels.check.outputs import PoisonedMemory, error_of, poison, tensors


class Side:
    """One contender over all buffers; a subclass per device type."""

    def __init__(self, contender: Contender, case: Case, sets: Sequence[tuple[Any, ...]]) -> None:
        self.contender = contender
        self.case = case
        self.sets = sets
        self.rounds = 1
        self.prepared = [contender.prepare(inputs) for inputs in sets]
        self.outputs: list[Any] = [None] * len(sets)

    def warm_up(self) -> None:
        raise NotImplementedError

    def extend(self, rounds: int) -> None:
        """Make a replay go through the sets ``rounds`` times."""
        self.rounds = rounds

    def poisoned_replay(self) -> None:
        raise NotImplementedError

    def timed_replay(self) -> Callable[[], float]:
        """Start a replay; the function gives its seconds once the device is synchronized."""
        raise NotImplementedError

    def replay_seconds(self) -> float:
        self.timed_replay()
        seconds_of = self.timed_replay()
        first = next(tensors(self.sets), None)
        if first is not None and first.is_cuda:
            torch.cuda.synchronize(first.device)
        return seconds_of()

    def error(self, exact: Callable[..., Any]) -> float:
        """The largest error of two sets on their present inputs: the first, which was called before
        the capture, and another by chance.

        Raises:
            WrongResultError: it is too large, an element was not written, or an input was.
        """
        checked = [0, *random.sample(range(1, len(self.sets)), min(1, len(self.sets) - 1))]
        for index in checked:
            self._prepare_again(index)
        with kept_inputs([self.sets[index] for index in checked]):
            self.poisoned_replay()
        return max(
            error_of(self.case, self.sets[index], self.outputs[index], exact) for index in checked
        )

    def call_all(self) -> None:
        for index, arguments in enumerate(self.prepared):
            # The previous round's output is freed only now: so outputs rotate as well.
            self.outputs[index] = self.contender.run(*arguments)

    def _prepare_again(self, index: int) -> None:
        new = self.contender.prepare(self.sets[index])
        for old, fresh in zip(tensors(self.prepared[index]), tensors(new), strict=True):
            if old.data_ptr() != fresh.data_ptr():
                old.copy_(fresh)


class Graph(Side):
    """On a GPU: captured once, replayed."""

    def warm_up(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # outside of the capture: compiles, searches, loads modules
            for arguments in self.prepared[:2]:
                self.contender.run(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        self._capture()

    def extend(self, rounds: int) -> None:
        super().extend(rounds)
        self._capture()

    def _capture(self) -> None:
        torch.cuda.synchronize()
        self.outputs = [None] * len(self.sets)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph):
                for _ in range(self.rounds):
                    self.call_all()
        except Exception:
            _capture_something()
            raise

    def poisoned_replay(self) -> None:
        poison(self.outputs)
        self._graph.replay()

    def timed_replay(self) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3


def _capture_something() -> None:
    """After a capture that failed, torch's random generator holds itself to be in it, and gives no
    numbers any more; one that succeeds ends that."""
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")


class Calls(Side):
    """On a CPU: called, with the host's clock."""

    def warm_up(self) -> None:
        self.call_all()

    def poisoned_replay(self) -> None:
        with PoisonedMemory():
            self.call_all()

    def timed_replay(self) -> Callable[[], float]:
        start = time.perf_counter()
        for _ in range(self.rounds):
            self.call_all()
        elapsed = time.perf_counter() - start
        return lambda: elapsed


def captured(contender: Contender, case: Case, inputs: tuple[Any, ...]) -> Graph:
    """The contender warmed up and captured in a CUDA graph on one set of inputs; ``error(exact)``
    of the result poisons the outputs, replays and checks."""
    graph = Graph(contender, case, [inputs])
    graph.warm_up()
    return graph


SIDES: dict[str, type[Side]] = {"cuda": Graph, "cpu": Calls}
