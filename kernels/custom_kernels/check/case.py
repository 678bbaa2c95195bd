# SPDX-License-Identifier: Apache-2.0
"""What is checked and measured: a case of an operation, and a contender that computes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from custom_kernels.check import outputs
from custom_kernels.operation import Backend


def same_arguments(inputs: Sequence[Any]) -> Sequence[Any]:
    """The contender takes the operation's own arguments."""
    return inputs


def always_available(_: torch.device) -> str | None:
    """The contender runs everywhere."""
    return None


@dataclass(frozen=True)
class Case:
    """One shape at which an operation is measured or checked."""

    labels: dict[str, str | int]
    """What tells it from the others, for example ``{"model": ..., "layer": "qkv", "M": 16}``."""
    empty_inputs: Callable[[torch.device], tuple[Any, ...]]
    """Allocates the operation's arguments, not yet filled."""
    fill: Callable[[Sequence[Any]], None]
    """Fills them in place with fresh random numbers."""
    flops: float
    """Floating-point operations of one call, as a dense product would need them."""
    bytes: float
    """The fewest bytes one call moves through HBM: each input read once, the output written
    once."""
    tolerance: float
    """The largest acceptable error."""
    error: Callable[[Sequence[Any], Any], float] | None = None
    """``error(inputs, outputs)``. None: ‖out - exact‖ / ‖exact‖ over some rows, the first and the
    last among them; the first input then has a row per token, and outputs must be finite."""
    peak: str = "bfloat16"
    """Whose dense matmul rate is the ceiling: bfloat16, float16, float8_e4m3fn or int8."""


@dataclass(frozen=True)
class Contender:
    """One thing that is timed: a backend of this package, or what a user would call instead."""

    name: str
    run: Callable[..., Any]
    """Called with what ``prepare`` returned, as positional arguments."""
    prepare: Callable[[Sequence[Any]], Sequence[Any]] = same_arguments
    """Makes its arguments from the operation's, outside of the timing: packs or quantizes a weight,
    say. It is called once per set of inputs, and again where results are checked, since inputs are
    then other numbers; tensors that it makes anew are copied over those of the first call.
    Everything else stays: what ``fill`` refreshes must be passed on or end up in a tensor."""
    unavailable_reason: Callable[[torch.device], str | None] = always_available
    """Why it cannot run on a device."""


def contender_of(
    backend: Backend, device: torch.device, dtype: str, cases: ModuleType | None = None
) -> Contender:
    """A backend as a contender: as its operation's cases set it up, or its plain call. Raises
    BackendError or BuildError if it cannot run."""
    cases = cases or backend.operation.cases
    if (make := getattr(cases, "contender", None)) is not None:
        made: Contender = make(backend, device, dtype)
        return made
    # What a backend supports is a matter of its first argument's dtype.
    smallest = next(iter(cases.checks(dtype)))
    first = next(outputs.tensors(smallest.empty_inputs(torch.device("cpu"))))
    return Contender(backend.name, backend.runner(device, first.dtype))
