# SPDX-License-Identifier: Apache-2.0
"""Messages between a verb and an engine process: the job, steps as they begin, the result.

Each is JSON in a file of the job's folder.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from workspace.bench.record import Metric, Round

Stage = Literal[
    "importing vLLM",
    "starting the engine",
    "warming up",
    "round",
    "comparing outputs",
    "scoring",
    "tracing",
    "stopping",
]
STAGES: tuple[Stage, ...] = tuple(
    stage for stage in get_args(Stage) if stage not in ("scoring", "tracing")
)
"""What an engine process of `make bench` does, in this order."""

WARM_ROUNDS = (2, 8)
"""Fewest and most warm-up rounds of a process."""
WORKER_EXTENSION = "--worker-extension-cls"
"""vLLM's argument for a class that its workers get as another base: workspace.bench.worker."""
EXECUTOR = "--distributed-executor-backend"
"""vLLM's argument for what starts its workers; with it they may be on other hosts."""
JOB, EVENTS, RESULT, SERVER = "job.json", "events.jsonl", "result.json", "server.json"
"""Files in a job's folder."""


def repetitions(stage: Stage, rounds: int) -> int:
    """How often a process with so many measured rounds goes through a stage, at least."""
    return {"warming up": WARM_ROUNDS[0], "round": rounds, "scoring": rounds}.get(stage, 1)


class EngineJob(BaseModel):
    """What every engine process is told: vLLM's arguments, the folder for the log of launches, and
    the folder for these messages."""

    arguments: list[str]
    launches: Path
    folder: Path


class Job(EngineJob):
    """What a process of `make bench` is to do.

    `arguments` go to `vllm bench METRIC`; `--seed` and the file of the result are added per round.
    For METRIC=serve, `server` has those of `vllm serve`, all of them about the engine.
    `prompts` are texts or token ids for the comparison of outputs. With `seconds`, no round begins
    that would end later than that after the start of the process, except that `fewest_rounds` are
    always measured.
    """

    metric: Metric
    server: list[str] = []
    rounds: int
    fewest_rounds: int = 1
    seconds: float | None = None
    seed: int
    prompts: list[str] | list[list[int]]
    new_tokens: int
    top: int


class Event(BaseModel):
    """A step begins: its stage and, for rounds, the number and how many there are at most."""

    stage: Stage
    number: int = 0
    of: int = 0

    def __str__(self) -> str:
        number = f" {self.number}" if self.number else ""
        return f"{self.stage}{number}{f' of {self.of}' if self.of else ''}"


Report = Callable[[Event], None]
"""Tells the parent process that a step begins."""


class Step(BaseModel):
    """One generated token, and the log-probabilities of the likeliest tokens including it."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    token: int
    logprobs: dict[int, float]


class Generation(BaseModel):
    """Greedy output for one prompt."""

    prompt: list[int]
    steps: list[Step]


class Ran(BaseModel):
    """What an engine process ran."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    launches: dict[int, dict[str, int]]
    layers: dict[int, dict[str, dict[str, int]]]
    """Launches by process and layer; layers without launches are included, empty."""
    tokens: dict[int, dict[str, dict[int, int]]]
    """Launches by process, kernel and number of tokens."""
    attention: list[str] = []
    """vLLM's names of its attention backends that the layers have, where its workers can be
    asked."""
    kernels_source_hash: str
    environment: dict[str, str]
    vllm_folder: str
    vllm_files: str
    """Hash over names, sizes and times of vLLM's Python files when the process began."""
    modules: dict[str, str]
    """Imported top-level modules and the file of each."""
    packages: dict[str, str]
    """Every distribution that the process finds, and its version."""
    dtype: str
    """What the engine computes in; not always the configuration's dtype."""

    def total_launches(self) -> Counter[str]:
        """Launches by operation and backend, over all processes."""
        return sum(map(Counter, self.launches.values()), Counter[str]())


class Result(Ran):
    """What a process of `make bench` measured."""

    engine_start_s: float
    warm_up: list[Round]
    rounds: list[Round]
    generations: list[Generation]
