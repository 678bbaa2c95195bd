# SPDX-License-Identifier: Apache-2.0
"""A case of an operation, and a contender that computes it: for checks and benchmarks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from custom_kernels.check import outputs
from custom_kernels.operation import Backend


@dataclass(frozen=True)
class Case:
    """One shape at which an operation is measured or checked."""

    labels: dict[str, str | int]
    """For example ``{"model": ..., "layer": "qkv", "M": 16}``; each case has its own."""
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
    last among them; the inputs ``per_token`` then have a row per token, and outputs must be
    finite."""
    per_token: tuple[int, ...] = (0,)
    """The places of those inputs, the first among them; each may be None."""
    peak: str = "bfloat16"
    """Whose dense matmul rate is the ceiling: bfloat16, float16, float8_e4m3fn or int8."""
    calls: int | None = None
    """How often a captured run called it; None if it comes from no capture."""


@dataclass(frozen=True)
class Contender:
    """What is timed: a backend of this package, or what a user would call instead."""

    name: str
    run: Callable[..., Any]
    """Called with what ``prepare`` returned, as positional arguments."""
    prepare: Callable[[Sequence[Any]], Sequence[Any]] = lambda inputs: inputs
    """Makes its arguments from the operation's, outside of the timing: packs or quantizes a weight,
    say. It is called once per set of inputs, and again before results are checked, since the inputs
    have other numbers then; its new tensors are copied over those of the first call. Nothing else
    is replaced: what ``fill`` refreshes must be passed on or end up in a tensor."""
    unavailable_reason: Callable[[torch.device], str | None] = lambda device: None
    """Why it cannot run on a device."""
    takes: Callable[[Case], bool] = lambda case: True
    """Whether it computes a case at all; one that it does not is left out."""


def contender_of(
    backend: Backend, device: torch.device, dtype: str, cases: ModuleType | None = None
) -> Contender:
    """A backend as a contender: as its operation's cases set it up, or its plain call.

    Raises:
        BackendError, BuildError: it cannot run on the device.
    """
    cases = cases or backend.operation.cases
    if (make := getattr(cases, "contender", None)) is not None:
        contender: Contender = make(backend, device, dtype)
        return contender
    # The dtype of the first argument decides whether a backend supports a call.
    smallest = next(iter(cases.checks(dtype)))
    first = next(outputs.tensors(smallest.empty_inputs(torch.device("cpu"))))
    return Contender(backend.name, backend.runner(device, first.dtype))
