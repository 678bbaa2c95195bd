# SPDX-License-Identifier: Apache-2.0
"""The record of `make eval`."""

from typing import Literal

from workspace.bench.record import DeviceKind, ModelRecord, Provenance, Strict


class TextRecord(Strict):
    """The text: its name, the hash of all of it, and how many of its first tokens were scored in
    windows of at most how many."""

    name: str
    sha256: str
    tokens: int
    windows: int
    window: int


class SideRecord(Strict):
    """One model: what was run, and the mean of -log p over the scored tokens, in nats.

    `quantized` says how the weights were loaded in 8 bits; `layers` has the launches by process and
    layer.
    """

    name: str
    model: ModelRecord
    quantized: str | None
    environment: dict[str, str]
    arguments: list[str]
    perplexity: float
    nats: float
    launches: dict[int, dict[str, int]]
    layers: dict[int, dict[str, dict[str, int]]]


class RatioRecord(Strict):
    """Perplexity of the model over that of what it was compared with, and the interval of 95 %."""

    ratio: float
    interval: tuple[float, float]


class Record(Strict):
    """One run of `make eval`. One that is not `valid` has `failures`, and must not be used."""

    schema_version: Literal[1] = 1
    run: str
    started: str
    duration_s: float
    valid: bool
    failures: list[str]
    command: str
    text: TextRecord
    device: str
    device_kind: DeviceKind
    tensor_parallel: int
    note: str
    against: SideRecord
    model: SideRecord
    comparison: RatioRecord
    provenance: Provenance
