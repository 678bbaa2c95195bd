# SPDX-License-Identifier: Apache-2.0
"""Messages between `make trace` and an engine process."""

from pathlib import Path

from pydantic import BaseModel

from workspace.bench.messages import EngineJob, Ran, Stage

STAGES: tuple[Stage, ...] = (
    "importing vLLM",
    "starting the engine",
    "warming up",
    "tracing",
    "stopping",
)
"""What an engine process of `make trace` does, in this order."""


class Linear(BaseModel):
    """A linear layer y [M, n] = x [M, k] · weight.T, and the bytes of all that it holds."""

    name: str
    n: int
    k: int
    bytes: int


class TraceJob(EngineJob):
    """Continue `requests` prompts of `input_len` random tokens by `output_len` tokens, under vLLM's
    profiler. Every worker writes a trace into `traces`; `dtypes` are those whose products are
    timed, none on a CPU."""

    requests: int
    input_len: int
    output_len: int
    eager: bool
    traces: Path
    dtypes: list[str]


class Traced(Ran):
    """What an engine process ran, the trace of each worker, and what is known of the first one."""

    traces: list[Path]
    untraced_s: float
    """Of a round like the traced one, before it."""
    traced_s: float
    linear: list[Linear]
    bytes_per_second: float | None
    """What the GPU copies, reads and writes together; None on a CPU."""
    flops_per_second: dict[str, float]
    """Of dense products on the GPU, by dtype."""
