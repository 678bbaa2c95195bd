# SPDX-License-Identifier: Apache-2.0
"""The record of a run: its models, and how it is written and read."""

from pathlib import Path
from typing import Annotated, Literal

from custom_kernels.bench.intervals import Verdict
from pydantic import BaseModel, BeforeValidator, ConfigDict

from workspace.host.files import write_file

Metric = Literal["throughput", "latency", "serve"]
Unit = Literal["tokens/s", "s", "requests/s", "ms"]
Weights = Literal["real", "dummy", "random"]
DeviceKind = Literal["cpu", "cuda"]
Executor = Literal["mp", "ray"]

CPU_NOTE = "CPU run: only the ratio is meaningful"
EXCLUDES_1 = "95 % CI excludes 1"
INCLUDES_1 = "95 % CI includes 1 and is wide"
WITHIN = "95 % CI within"
REWORDED = {
    "CPU: only the ratio means something": CPU_NOTE,
    "the interval leaves out 1": EXCLUDES_1,
    "the interval holds 1 and is wide": INCLUDES_1,
    "the interval lies within": WITHIN,
}


def _reword(text: object) -> object:
    for old, new in REWORDED.items():
        text = text.replace(old, new) if isinstance(text, str) else text
    return text


Message = Annotated[str, BeforeValidator(_reword)]
"""A message in a record; one with an earlier version's wording is shown with today's."""


class Strict(BaseModel):
    """What a record is made of: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Served(Strict):
    """What the clients of a server saw in a round, by vLLM's own figures.

    Requests per second; milliseconds to a request's first token (`ttft`), and for each token after
    that (`tpot`, of a request its mean): the median and the 99th percentile over the requests.
    """

    requests_per_s: float
    good_per_s: float | None
    """Requests per second that kept to GOODPUT, if that is given."""
    ttft_ms: float
    ttft_p99_ms: float
    tpot_ms: float
    tpot_p99_ms: float


class Round(Strict):
    """One timed call of vLLM's benchmark: its figures, and the token counts of the requests."""

    seed: int
    elapsed_s: float
    prompt_tokens: int
    output_tokens: int
    reported_tokens: int | None
    """vLLM's own total, of METRIC=serve the server's; its latency benchmark reports none."""
    served: Served | None = None
    """Of METRIC=serve."""


class ModelRecord(Strict):
    """The model: `weights` says whether its weights are real, dummy or random, `quantized` how they
    are stored in its folder if that is in 8 bits ("2:4 int8")."""

    name: str
    weights: Weights
    seed: int | None
    source: str
    dtype: str
    parameters: int | None
    quantized: str | None = None


class ProcessRecord(Strict):
    """One process: `order` counts from 1 over the whole run; `figures` has one value per round."""

    order: int
    pair: int
    vllm_folder: str
    engine_start_s: float
    warm_up: list[Round]
    rounds: list[Round]
    figures: list[float]
    launches: dict[int, dict[str, int]]
    layers: dict[int, dict[str, dict[str, int]]] = {}
    """Launches by worker process (its rank with EXECUTOR=ray, else its process id) and layer; not
    in records from before LAYERS existed."""
    tokens: dict[int, dict[str, dict[int, int]]] = {}
    """Launches by worker process, kernel and number of tokens: 64 counts those of 57 to 64, as in
    `custom_kernels.buckets`. Not in the first records."""
    attention: list[str] = []
    """vLLM's names of the attention backends that its layers have; ours have the names of those
    that they replace. Not in records from before attention could be replaced."""


class VariantRecord(Strict):
    """One variant: what was set and run, and its figures over all processes."""

    name: str
    environment: dict[str, str]
    command: str
    processes: list[ProcessRecord]
    median: float
    lowest: float
    highest: float
    launches: dict[str, int]

    @property
    def figures(self) -> list[float]:
        """Of all rounds of all processes."""
        return [figure for process in self.processes for figure in process.figures]


class Settings(Strict):
    """What was measured, with every default filled in."""

    metric: Metric
    input_len: int
    output_len: int
    num_prompts: int
    request_rate: float | None = None
    """Requests per second of METRIC=serve; None: all at once."""
    goodput: str | None = None
    op: str | None = None
    backend: str | None
    layers: str | None = None
    quantization: str | None = None
    engine: Literal["fork", "released"] = "fork"
    way: Literal["layer", "ir"] = "layer"
    repeats: int
    rounds: int
    tensor_parallel: int
    pipeline_parallel: int = 1
    executor: Executor = "mp"
    eager: bool
    input_tokens_per_round: int
    output_tokens_per_round: int

    @property
    def parallel(self) -> str:
        """ "TP 2", "TP 2, PP 2, Ray": how the engine is spread over devices."""
        stages = f", PP {self.pipeline_parallel}" if self.pipeline_parallel > 1 else ""
        return f"TP {self.tensor_parallel}{stages}{', Ray' if self.executor == 'ray' else ''}"


class Noise(Strict):
    """How far stock was from itself on this machine: in none of `runs` runs of BASELINE=self was
    the ratio further from 1 than `band`, a share, up or down.

    `squares`, with `freedom` degrees of freedom, says how far processes were apart: see
    `compare.spread`. Not in records from before intervals were those of processes.
    """

    runs: int
    band: float
    squares: float = 0.0
    freedom: int = 0


class Comparison(Strict):
    """The ratio candidate / baseline of the measured figure.

    `interval` contains the true ratio with probability `coverage`; of one pair without runs of
    BASELINE=self, that of these two processes only. `pairs` are the medians of the single pairs of
    processes; `scatter` is that of the noisier variant; `verdict` is about speed, whether a higher
    figure is better or worse.
    """

    ratio: float
    interval: tuple[float, float]
    coverage: float
    pairs: list[float]
    scatter: float
    verdict: Verdict
    because: Message
    noise: Noise | None = None
    """None: BASELINE=self never ran here with this model and metric."""


class Figure(Strict):
    """A figure of METRIC=serve beside the one with the run's verdict.

    `medians` are those over the rounds of each variant; there is no `comparison` where a round has
    a figure of zero.
    """

    name: str
    unit: Unit
    medians: list[float]
    comparison: Comparison | None


class Agreement(Strict):
    """How far greedy outputs of two variants agree, up to each prompt's first different token.

    `tokens` were compared, `matched` of them are equal; `diverged` prompts stop early.
    Differences are those of log-probabilities in nats, over the likeliest tokens of each step.
    """

    prompts: int
    tokens: int
    matched: int
    diverged: int
    largest: float
    mean: float
    allowed_largest: float
    allowed_mean: float
    failures: list[str]
    lossy: bool = False
    """One variant computes something else on purpose: a distance is reported, nothing proven."""

    @property
    def passed(self) -> bool:
        return not self.failures


class GitState(Strict):
    """A git tree: its commit, and whether anything in it is uncommitted."""

    commit: str
    dirty: bool


class Binaries(Strict):
    """Where the compiled files in vLLM's tree come from.

    `wheel` is the released wheel, empty if none is unpacked. `compiled` has a local build's name
    (an extension, or all) and git's hash of the tree of sources that it was made from, which the
    fork's repository keeps. `outdated` are sources that were edited and not compiled since.
    """

    wheel: str
    compiled: dict[str, str]
    outdated: list[str]


class Provenance(Strict):
    """Sources, versions and machine of a run.

    `environment` has the versions that the engine's process reported; `locks` the SHA-256 of each
    requirement lock; `kernels` the SHA-256 over all kernel sources.
    """

    workspace: GitState | None
    fork: GitState | None
    binaries: Binaries | None = None
    locks: dict[str, str]
    kernels: str
    environment: dict[str, str]
    cpu: str
    cpu_flags: list[str]
    cores: int
    system: str
    load_before: float
    """Processes running or waiting in the minute before the run."""


class Record(Strict):
    """One run of `make bench`.

    Figures are in `unit`: tokens per second (input and output together), seconds per batch, or of
    METRIC=serve what `figure` says. `comparison` is the second variant over the first. A record
    that is not `valid` has `failures` and its figures must not be used.
    """

    schema_version: Literal[1] = 1
    run: str
    started: str
    duration_s: float
    valid: bool
    failures: list[str]
    command: str
    settings: Settings
    model: ModelRecord
    device: str
    device_kind: DeviceKind
    note: Message
    unit: Unit
    figure: str | None = None
    variants: list[VariantRecord]
    comparison: Comparison
    figures: list[Figure] = []
    """The others of METRIC=serve."""
    agreement: Agreement
    baseline_with_itself: Agreement | None
    candidate_with_itself: Agreement | None = None
    provenance: Provenance

    @property
    def measured(self) -> str:
        """What the figures are: "throughput, tokens/s"."""
        return f"{self.figure or self.settings.metric}, {self.unit}"

    @property
    def by_process(self) -> list[list[list[float]]]:
        """[variants][processes][rounds] of figures."""
        return [[run.figures for run in side.processes] for side in self.variants]


def higher_is_better(unit: Unit) -> bool:
    """Whether a figure is a rate, not a time."""
    return unit.endswith("/s")


def write(record: Strict, path: Path) -> None:
    """Write a record; a kill or a full disk leaves the old file or none, never half a file."""
    write_file(path, record.model_dump_json(indent=2).encode() + b"\n")


def read(path: Path) -> Record:
    """Read a record.

    Raises:
        pydantic.ValidationError: not a record of this schema version.
    """
    return Record.model_validate_json(path.read_text())
