# SPDX-License-Identifier: Apache-2.0
"""The cases, backends and baselines that a command line selects."""

import argparse
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch

from custom_kernels import registry
from custom_kernels.bench import shapes
from custom_kernels.bench.record import Captured
from custom_kernels.check.case import Case, Contender, contender_of
from custom_kernels.command import UsageError
from custom_kernels.compile.toolchain import BuildError

REFERENCE = "reference"
"""The backend that defines the right result. It is timed only where it is named: what a user would
call instead is among the baselines."""


@dataclass(frozen=True)
class Plan:
    """The command line with every default filled in."""

    operation: str
    dtype: str
    models: list[str]
    tokens: list[int]
    patterns: list[str]
    backends: list[str] | None
    """None: every backend that can run."""
    seconds: float
    repetitions: int
    shapes: Path | None = None
    """The record of a capture, whose cases are measured instead of those of models and tokens."""
    top: int = 0
    """So many of them."""

    def command(self) -> str:
        """The command that repeats the run, without the folder of the record."""
        words = ["python", "-m", "custom_kernels.bench", self.operation]
        words += [word for model in self.models for word in ("--model", model)]
        words += ["--tokens", *map(str, self.tokens)] if self.tokens else []
        words += ["--shapes", str(self.shapes), "--top", str(self.top)] if self.shapes else []
        words += ["--pattern", *self.patterns] if self.patterns else []
        words += ["--backend", ",".join(self.backends)] if self.backends else []
        words += ["--dtype", self.dtype, "--seconds", str(self.seconds)]
        return shlex.join([*words, "--repetitions", str(self.repetitions)])


def plan_of(options: argparse.Namespace, definition: ModuleType) -> Plan:
    """The plan of a command line.

    Raises:
        UsageError: a name that does not exist, or a number that is not positive.
    """
    if options.shapes and (options.model or options.tokens):
        raise UsageError(
            "a capture has models and numbers of tokens; leave out --model and --tokens"
        )
    default: str = definition.DTYPES[0]
    if options.shapes:
        default = shapes.dtype_of(shapes.read(options.shapes), definition)
    dtype = known("dtype", [options.dtype or default], definition.DTYPES)[0]
    backends = None
    if options.backend and options.backend != "all":
        wanted = [name for name in options.backend.split(",") if name]
        backends = known("backend", wanted, backend_names(options.operation))
    if options.seconds <= 0 or min(options.repetitions, options.top, *(options.tokens or [])) < 1:
        raise UsageError("--seconds, --repetitions, --tokens and --top must be positive")
    models = known_models(options.model or definition.DEFAULT_MODELS, definition.MODELS)
    return Plan(
        operation=options.operation,
        dtype=dtype,
        models=[] if options.shapes else models,
        tokens=[] if options.shapes else list(options.tokens or definition.TOKENS),
        patterns=options.pattern,
        backends=backends,
        seconds=options.seconds,
        repetitions=options.repetitions,
        shapes=options.shapes,
        top=options.top if options.shapes else 0,
    )


def backend_names(operation: str) -> list[str]:
    """By priority."""
    return [backend.name for backend in registry.operation(operation).backends]


def known(what: str, wanted: Iterable[str], existing: Iterable[str]) -> list[str]:
    """``wanted`` without repetitions.

    Raises:
        UsageError: one does not exist, or none is wanted; names those that exist.
    """
    wanted, existing = list(dict.fromkeys(wanted)), list(dict.fromkeys(existing))
    unknown = sorted(set(wanted) - set(existing))
    if unknown or not wanted:
        raise UsageError(
            f"no {what} {', '.join(unknown) or 'is named'}; known: {', '.join(existing)}"
        )
    return wanted


def known_models(wanted: Iterable[str], existing: Iterable[str]) -> list[str]:
    """`known` of models, which may have their names on the hub: Qwen/Qwen2.5-7B is qwen2.5-7b."""
    return known("model", (name.rpartition("/")[2].lower() for name in wanted), existing)


def choose(cases: Iterable[Case], label: str, wanted: Iterable[str]) -> list[Case]:
    """The cases with one of these values of a label; all if none is wanted.

    Raises:
        UsageError: a value without a case.
    """
    cases, wanted = list(cases), list(wanted)
    values = [str(case.labels.get(label, "none")) for case in cases]
    if not wanted:
        return cases
    known(label, wanted, values)
    return [case for case, value in zip(cases, values, strict=True) if value in wanted]


def cases_of(plan: Plan, definition: ModuleType) -> tuple[list[Case], Captured | None]:
    """The plan's cases; and which part of a capture they are.

    Raises:
        UsageError: a pattern has none, or the capture has none of the operation.
    """
    if plan.shapes is None:
        cases = definition.cases(plan.models, plan.tokens, plan.dtype)
        return choose(cases, "pattern", plan.patterns), None
    captured = shapes.cases(shapes.read(plan.shapes), definition, plan.dtype)
    every = choose(captured, "pattern", plan.patterns)
    return shapes.costliest(every, plan.top, plan.shapes)


def contenders_of(
    plan: Plan, definition: ModuleType, device: torch.device
) -> tuple[list[Contender], list[str], dict[str, str]]:
    """All that is timed, the named baseline first; the names of those that are backends of this
    package; and what is not timed, with the reason.

    Raises:
        UsageError: the named baseline, a requested backend, or every backend cannot run here.
    """
    skipped: dict[str, str] = {}
    baselines = []
    for contender in definition.baselines(plan.dtype):
        reason = contender.unavailable_reason(device)
        if reason is None:
            baselines.append(contender)
        elif not baselines and not skipped:
            raise UsageError(f"the baseline {contender.name} cannot run on {device}: {reason}")
        else:
            skipped[contender.name] = reason
    ours = []
    wanted = plan.backends or [name for name in backend_names(plan.operation) if name != REFERENCE]
    for name in wanted:
        backend = registry.operation(plan.operation).backend(name)
        try:
            ours.append(contender_of(backend, device, plan.dtype, definition))
        except (registry.BackendError, BuildError) as error:
            reason = backend.unavailable_reason(device) or str(error)
            if plan.backends:
                raise UsageError(f"{name} cannot run on {device}: {reason}") from error
            skipped[name] = reason
    if not ours:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise UsageError(f"no backend of {plan.operation} can run on {device} ({reasons})")
    taken = {contender.name for contender in baselines}
    # A backend may have the name of a baseline: then both are shown, and told apart.
    named = [replace(one, name=f"{one.name} (ours)") if one.name in taken else one for one in ours]
    return [*baselines, *named], [one.name for one in named], skipped
