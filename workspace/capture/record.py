# SPDX-License-Identifier: Apache-2.0
"""The record of `make capture`, which `make bench-kernels SHAPES=` reads, too."""

from typing import Literal

from custom_kernels.bench.shapes import Capture

from workspace.bench.record import ModelRecord, Provenance, Round, Strict


class Workload(Strict):
    """What was run, with every default filled in."""

    input_len: int
    output_len: int
    num_prompts: int
    tensor_parallel: int
    eager: bool


class Record(Capture, Strict):
    """What each worker of one engine ran. One that is not `valid` has `failures`.

    `workload`, `model`, `round` and `provenance` are those of a run by `make capture`. Of files
    that another engine wrote nothing is known but what its workers say.
    """

    schema_version: Literal[1] = 1
    run: str
    started: str
    valid: bool
    failures: list[str]
    command: str
    workload: Workload | None = None
    model: ModelRecord | None = None
    round: Round | None = None
    provenance: Provenance | None = None
