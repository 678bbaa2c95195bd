# SPDX-License-Identifier: Apache-2.0
"""The JSON record of a run: its schema, and how it is written."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from workspace.bench.checks import Agreement
from workspace.bench.compare import Comparison
from workspace.bench.engine_run import Round
from workspace.bench.models import Weights
from workspace.bench.plan import Metric
from workspace.bench.provenance import Provenance
from workspace.host.files import write_file


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class ModelRecord(_Strict):
    """The model: `weights` says whether its weights are real, dummy or random."""

    name: str
    weights: Weights
    seed: int | None
    source: str
    dtype: str
    parameters: int | None


class ProcessRecord(_Strict):
    """One process: `order` counts from 1 over the whole run; `figures` are one per round."""

    order: int
    pair: int
    vllm_folder: str
    engine_start_s: float
    warm_up: list[Round]
    rounds: list[Round]
    figures: list[float]
    launches: dict[int, dict[str, int]]
    layers: dict[int, dict[str, dict[str, int]]] = {}
    """Launches by worker process and layer; absent from records made before there was LAYERS."""


class VariantRecord(_Strict):
    """One side: what was set and run, and its figures over all processes."""

    name: str
    environment: dict[str, str]
    command: str
    processes: list[ProcessRecord]
    median: float
    lowest: float
    highest: float
    launches: dict[str, int]


class Settings(_Strict):
    """What was measured, with every default filled in."""

    metric: Metric
    input_len: int
    output_len: int
    num_prompts: int
    backend: str | None
    layers: str | None = None
    quantization: str | None = None
    repeats: int
    rounds: int
    tensor_parallel: int
    eager: bool
    input_tokens_per_round: int
    output_tokens_per_round: int


class Record(_Strict):
    """One run of `make bench`.

    Figures are in `unit`: tokens per second (input and output together) or seconds per batch.
    `comparison` is the second variant over the first. A record that is not `valid` has
    `failures` and its figures must not be used.
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
    device_kind: Literal["cpu", "cuda"]
    note: str
    unit: Literal["tokens/s", "s"]
    variants: list[VariantRecord]
    comparison: Comparison
    agreement: Agreement
    baseline_with_itself: Agreement | None
    candidate_with_itself: Agreement | None = None
    provenance: Provenance


def write(record: Record, path: Path) -> None:
    """Write the record; a kill or a full disk leaves the old file or none, never a half one."""
    write_file(path, record.model_dump_json(indent=2).encode() + b"\n")


def read(path: Path) -> Record:
    """Read a record back.

    Raises:
        pydantic.ValidationError: not a record of this schema version.
    """
    return Record.model_validate_json(path.read_text())
