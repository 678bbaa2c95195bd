# SPDX-License-Identifier: Apache-2.0
"""Messages between `make eval` and an engine process."""

from workspace.bench.messages import EngineJob, Ran, Stage

STAGES: tuple[Stage, ...] = ("importing vLLM", "starting the engine", "scoring", "stopping")
"""What an engine process of `make eval` does, in this order."""


class ScoreJob(EngineJob):
    """`windows` of token ids; `at_once` of them are one step of progress."""

    windows: list[list[int]]
    at_once: int


class Scores(Ran):
    """For each window the log-probability of each token but the first."""

    logprobs: list[list[float]]
