# SPDX-License-Identifier: Apache-2.0
"""The record of `make capture`, and the cases of an operation that are in it.

A call is a layer's shape at one number of rows M; its count is layers times steps. A case costs
about its count times the longer of the time for its bytes and for its operations. Nothing here
needs a GPU.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from custom_kernels.bench import record
from custom_kernels.bench.record import Captured, Labels
from custom_kernels.check.case import Case
from custom_kernels.command import UsageError

FLOPS_PER_BYTE = 256.0
"""Where a device multiplies for as long as it reads: 206 on an H200 in bfloat16, 295 on an H100.
Only the order of cases depends on it."""


class Layer(BaseModel):
    """The layers of a worker that have one shape, see ``custom_kernels.vllm.capture``."""

    operation: str
    rows: Literal["tokens", "outputs", "decodes"]
    shape: dict[str, int | bool]
    method: str | None
    names: list[str]

    @property
    def label(self) -> str:
        """``qkv_proj``; ``q_proj+k_proj`` for several that have the same shape."""
        return "+".join(dict.fromkeys(name.rpartition(".")[2] for name in self.names))


class Worker(BaseModel):
    """What one worker of an engine counted, see ``custom_kernels.vllm.capture``."""

    schema_version: Literal[1]
    worker: str
    rank: int
    vllm: str
    device: str
    dtype: str
    model: str
    started: str
    layers: list[Layer]
    left_out: dict[str, list[str]]
    scheduled: int
    tokens: dict[int, int]
    outputs: dict[int, int]
    decodes: list[tuple[int, int, int]]

    @property
    def steps(self) -> int:
        return sum(self.tokens.values())


class Capture(BaseModel):
    """What of such a record is needed here."""

    workers: list[Worker] = Field(min_length=1)


class Call(NamedTuple):
    """A layer's shape at one number of rows, and how often it was called."""

    layer: Layer
    m: int
    shape: dict[str, int | bool]
    """Of the layer, of attention with the mean `length` of the sequences."""
    count: int


def read(path: Path) -> Capture:
    """The record of `make capture`.

    Raises:
        RecordError: it is none.
    """
    content = record.read_json(path)
    if "workers" not in content:
        raise record.RecordError(f"{path} is not the record of a capture; make capture writes one")
    try:
        return Capture.model_validate(content)
    except ValidationError as error:
        raise record.damaged(path, error) from error


def calls(worker: Worker) -> Iterator[Call]:
    """All calls of one worker."""
    for layer in worker.layers:
        number = len(layer.names)
        if layer.rows == "decodes":
            for m, length, steps in worker.decodes:
                yield Call(layer, m, layer.shape | {"length": length}, number * steps)
            continue
        for m, steps in getattr(worker, layer.rows).items():
            yield Call(layer, m, layer.shape, number * steps)


def cases(
    capture: Capture, definition: ModuleType, dtype: str, of: str | None = None
) -> list[Case]:
    """The cases of an operation, with their calls by all workers, the costliest first.

    Args:
        of: the operation whose layers are wanted; None: all that the definition names.

    Raises:
        UsageError: its cases cannot be made from layers, or there is no such layer.
    """
    operation = definition.__name__.split(".")[-2]
    made = getattr(definition, "captured", None)
    if made is None:
        raise UsageError(
            f"{operation} cannot be measured at captured shapes: its cases.py has no captured()"
        )
    found: dict[tuple[tuple[str, str | int], ...], Case] = {}
    for worker in capture.workers:
        for call in calls(worker):
            if call.layer.operation not in ((of,) if of else definition.CAPTURED):
                continue
            labels: Labels = {"model": worker.model, "layer": call.layer.label}
            for case in made(labels, call.m, call.shape, dtype):
                key = tuple(case.labels.items())
                before = found[key].calls if key in found else 0
                found[key] = replace(case, calls=call.count + (before or 0))
    if not found:
        raise UsageError(f"the capture has no layer that {operation} computes")
    return sorted(found.values(), key=cost, reverse=True)


def costliest(found: list[Case], top: int, path: Path) -> tuple[list[Case], Captured]:
    """The first `top` of what `cases` found, and which part of the capture in `path` they are."""
    chosen = found[:top]
    share = sum(map(cost, chosen)) / sum(map(cost, found))
    return chosen, Captured(file=path.name, shapes=len(found), share=share)


def cost(case: Case) -> float:
    """Of all its calls, in bytes."""
    return (case.calls or 1) * max(case.bytes, case.flops / FLOPS_PER_BYTE)


def dtype_of(capture: Capture, definition: ModuleType) -> str:
    """What the model computes in; the default of an operation that cannot, or computes on 8-bit
    values and has its own."""
    default: str = definition.DTYPES[0]
    given = capture.workers[0].dtype
    return given if default == "bfloat16" and given in definition.DTYPES else default
