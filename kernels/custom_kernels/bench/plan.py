# SPDX-License-Identifier: Apache-2.0
"""What a command line asks a benchmark for: cases, backends and baselines."""

import argparse
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from custom_kernels import registry
from custom_kernels.bench.records import label_words
from custom_kernels.compile.toolchain import BuildError

REFERENCE = "reference"
"""A backend that says what is right. It is timed only where it is named: what a user would call
instead is among the baselines."""


class UsageError(RuntimeError):
    """The command cannot be carried out. The message is one line with the remedy."""


@dataclass(frozen=True)
class Plan:
    """What a command line asks for, with every default filled in."""

    operation: str
    dtype: str
    models: list[str]
    tokens: list[int]
    patterns: list[str]
    backends: list[str] | None
    """None: every backend that can run."""
    seconds: float
    repetitions: int

    def command(self) -> str:
        """What repeats the run; where the record goes is not part of it."""
        words = ["python", "-m", "custom_kernels.bench", self.operation]
        words += [word for model in self.models for word in ("--model", model)]
        words += ["--tokens", *map(str, self.tokens)]
        words += ["--pattern", *self.patterns] if self.patterns else []
        words += ["--backend", ",".join(self.backends)] if self.backends else []
        words += ["--dtype", self.dtype, "--seconds", str(self.seconds)]
        return shlex.join([*words, "--repetitions", str(self.repetitions)])


def plan_of(options: argparse.Namespace, definition: ModuleType) -> Plan:
    """The command line with every default filled in. Raises UsageError for what is not there."""
    dtype = _known("dtype", [options.dtype or definition.DTYPES[0]], definition.DTYPES)[0]
    backends = None
    if options.backend and options.backend != "all":
        wanted = [name for name in options.backend.split(",") if name]
        backends = _known("backend", wanted, backend_names(options.operation))
    if options.seconds <= 0 or options.repetitions < 1 or min(options.tokens or [1]) < 1:
        raise UsageError("--seconds, --repetitions and --tokens must be positive")
    return Plan(
        operation=options.operation,
        dtype=dtype,
        models=_known("model", options.model or definition.DEFAULT_MODELS, definition.MODELS),
        tokens=list(options.tokens or definition.TOKENS),
        patterns=options.pattern,
        backends=backends,
        seconds=options.seconds,
        repetitions=options.repetitions,
    )


def backend_names(operation: str) -> list[str]:
    """By priority."""
    return [backend.name for backend in registry.operation(operation).backends]


def _known(what: str, wanted: Iterable[str], there: Iterable[str]) -> list[str]:
    wanted, there = list(dict.fromkeys(wanted)), list(there)
    unknown = sorted(set(wanted) - set(there))
    if unknown or not wanted:
        raise UsageError(f"no {what} {', '.join(unknown)}; there are: {', '.join(there)}")
    return wanted


def cases_of(plan: Plan, definition: ModuleType) -> list[Any]:
    """The plan's cases. Raises UsageError if a pattern has none."""
    cases = list(definition.cases(plan.models, plan.tokens, plan.dtype))
    if not plan.patterns:
        return cases
    there = dict.fromkeys(str(case.labels.get("pattern", "none")) for case in cases)
    patterns = _known("pattern", plan.patterns, there)
    return [case for case in cases if str(case.labels.get("pattern", "none")) in patterns]


def contenders_of(
    plan: Plan, definition: ModuleType, device: Any
) -> tuple[list[Any], list[str], dict[str, str]]:
    """All that is timed, the named baseline first; which of them are ours; what is not timed, and
    why.

    Raises UsageError if the named baseline, a backend that was asked for, or every backend cannot
    run here.
    """
    from custom_kernels.check.case import contender_of

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
    # A backend may be called like a baseline; then both are shown, and ours says that it is ours.
    named = [replace(one, name=f"{one.name} (ours)") if one.name in taken else one for one in ours]
    return [*baselines, *named], [one.name for one in named], skipped


def label_text(labels: dict[str, Any]) -> str:
    """``qwen2.5-7b qkv M=16 N=4608 K=3584``."""
    return " ".join(label_words(labels))
