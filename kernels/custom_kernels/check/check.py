# SPDX-License-Identifier: Apache-2.0
"""Check a backend on every case of its operation's ``cases.checks`` against the exact result.

``python -m custom_kernels.check gemm.triton`` on the GPU, or without one in Triton's
interpreter. Each case is called

- on fresh random inputs, twice with other numbers, so that a remembered result is wrong;
- with memory that torch allocates poisoned first, so that elements that are not written show;
- with inputs that must stay as they are, and outputs in memory of their own;
- twice with the same inputs, which must give the same bits (a comment ``# not deterministic:
  <reason>`` in the backend's file, ``//`` in a ``.cu``, says that they need not);
- on a GPU also captured in a CUDA graph and replayed on other numbers.

A case without elements (no rows) goes through the operation's public function, which handles it.
Tolerances are those of the cases.

A bare check leaves out what a tool that watches every access to memory does not need, or cannot
follow: memory is not poisoned, since what was poisoned counts as written, and nothing is captured,
since torch captures no call without its caching allocator.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from custom_kernels.check.case import Case, Contender, contender_of
from custom_kernels.check.guards import different, kept_inputs, require_own_memory
from custom_kernels.check.outputs import PoisonedMemory, WrongResultError, error_of, tensors
from custom_kernels.check.replay import captured
from custom_kernels.inspect.compilers import explain
from custom_kernels.operation import Backend, BackendError


@dataclass(frozen=True)
class Checked:
    """One case of one backend."""

    dtype: str
    labels: dict[str, str | int]
    seconds: float
    error: float | None = None
    """The largest error seen; None if it failed before there was one."""
    failure: str | None = None
    """What is wrong, with the first wrong element; None if it is right."""

    def __str__(self) -> str:
        shape = (f"{name}={value}" for name, value in self.labels.items())
        what = " ".join(part for part in (self.dtype, *shape) if part)
        return f"{what}: " + (self.failure or f"error {self.error:.1e}")


def dtypes(backend: Backend, device: torch.device) -> list[str]:
    """Names of the operation's dtypes that the backend supports on a device.

    Raises:
        BackendError: it cannot run there, or supports none of them.
    """
    backend.require_available(device)
    supported: list[str] = []
    reason = BackendError(f"{backend.operation}: its cases.py names no DTYPES")
    for dtype in backend.operation.cases.DTYPES:
        try:
            contender_of(backend, device, dtype)
        except BackendError as error:
            reason = error
        else:
            supported.append(dtype)
    if not supported:
        raise reason
    return supported


def check(
    backend: Backend,
    device: torch.device,
    dtype: str | None = None,
    quick: bool = False,
    bare: bool = False,
) -> list[Checked]:
    """Check every case.

    Args:
        dtype: the only one; default: each that the backend supports.
        quick: take the first dtype only and call each case on one set of numbers only, on a CPU
            once.
        bare: neither poison memory nor capture a CUDA graph.

    Raises:
        BackendError, BuildError: the backend cannot run on the device.
    """
    operation = backend.operation
    names = [dtype] if dtype else dtypes(backend, device)
    public = functools.partial(operation.function, backend=backend.name)
    results: list[Checked] = []
    for name in names[:1] if quick else names:
        contender = contender_of(backend, device, name)
        results += [
            check_case(
                contender,
                case,
                operation.reference.exact,
                device,
                dtype=name,
                public=public,
                deterministic="not deterministic" not in backend.notes,
                quick=quick,
                bare=bare,
            )
            for case in operation.cases.checks(name)
            if contender.takes(case)
        ]
    return results


def check_case(
    contender: Contender,
    case: Case,
    exact: Any,
    device: torch.device,
    *,
    dtype: str = "",
    public: Callable[..., Any] | None = None,
    deterministic: bool = True,
    quick: bool = False,
    bare: bool = False,
) -> Checked:
    """Check one implementation at one case; whatever is wrong with it is in the result.

    Args:
        exact: computes the exact result from the inputs.
        public: called instead where an input has no elements, which a backend never gets.
        deterministic: whether two calls must give the same bits.
    """
    started = time.perf_counter()
    worst: float | None = None
    failure = None
    poisoned = contextlib.nullcontext if bare else PoisonedMemory
    try:
        inputs = case.empty_inputs(device)
        run = contender.run
        if public is not None and not all(one.numel() for one in tensors(inputs)):
            run = public
        for _ in range(1 if quick else 2):
            case.fill(inputs)
            arguments = contender.prepare(inputs)
            with kept_inputs(() if bare else inputs), poisoned():
                outputs = run(*arguments)
            require_own_memory(outputs, [inputs, arguments], "an input")
            try:
                worst = max(worst or 0.0, error_of(case, inputs, outputs, exact))
            except WrongResultError as error:
                raise WrongResultError(
                    f"{error}{_first_wrong(case, inputs, outputs, exact)}"
                ) from None
            if not deterministic or (quick and device.type == "cpu"):
                continue
            with poisoned():
                again = run(*arguments)
            require_own_memory(again, outputs, "the call before")
            if where := _first_different(outputs, again):
                raise WrongResultError(f"two calls on the same inputs differ{where}")
        if device.type == "cuda" and run is contender.run and not bare:
            graph = captured(contender, case, inputs)
            case.fill(inputs)
            try:
                worst = max(worst or 0.0, graph.error(exact))
            except WrongResultError as error:
                raise WrongResultError(f"replayed from a CUDA graph: {error}") from None
            torch.cuda.synchronize(device)
    except WrongResultError as error:
        failure = str(error)
    except Exception as error:
        # An error of CUDA explains itself at length: its first line is what happened.
        failure = explain(error)
        if "CUDA error" in failure:
            failure = failure.splitlines()[0]
    return Checked(dtype, case.labels, time.perf_counter() - started, worst, failure)


def _first_wrong(case: Case, inputs: Sequence[Any], outputs: Any, exact: Any) -> str:
    """Where the output is first clearly wrong, if it can be compared element by element."""
    got = list(tensors(outputs))
    for index, (output, right) in enumerate(zip(got, tensors(exact(*inputs)), strict=False)):
        if output.shape != right.shape:
            return f"; the output has shape {list(output.shape)}, not {list(right.shape)}"
        have, want = output.double(), right.double()
        size = float(want.nan_to_num().norm()) / max(1, want.numel()) ** 0.5
        allowed = 8 * case.tolerance * torch.maximum(want.abs(), torch.tensor(size))
        wrong = ~((have - want).abs() <= allowed) & ~(have.isnan() & want.isnan())
        if wrong.any():
            index_of = wrong.nonzero()[0].tolist()
            name = f"output {index}" if len(got) > 1 else "output"
            return (
                f"; first at {name}{index_of}: {float(have[tuple(index_of)]):.6g}, expected "
                f"{float(want[tuple(index_of)]):.6g} ({int(wrong.sum())} of {wrong.numel()} wrong)"
            )
    return ""


def _first_different(one: Any, other: Any) -> str:
    for a, b in zip(tensors(one), tensors(other), strict=True):
        differs = different(a, b)
        if differs.any():
            return f", first at {differs.nonzero()[0].tolist()}"
    return ""
