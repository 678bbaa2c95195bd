# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.bench OPERATION``: every backend against what a user would call
instead, on this GPU.

An operation is measured at the shapes of its ``cases.py``. Prints a table, writes one JSON record
with its provenance and two pictures beside it. ``--record FILE`` shows a record that is there
already; that needs no GPU. Exits with 1 if one of our backends or the baseline gives a wrong result
or fails, or if there is no GPU.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from custom_kernels import build, pictures, records

REFERENCE = "reference"
"""A backend that says what is right. It is timed only where it is named: what a user would call
instead is among the baselines."""
PACKAGES = ("triton", "cupy-cuda13x", "vllm", "flashinfer-python", "nvidia-cublas")
"""Whose version a time may depend on, beside torch's."""


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, report. Returns the exit status."""
    try:
        return _main(arguments)
    except (UsageError, records.RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _main(arguments: Sequence[str] | None) -> int:
    for package in ("torch", "rich", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"{package} is not installed; run `make dev`, or install custom-kernels[bench]"
            )
    options = _parser().parse_args(arguments)
    if options.record:
        return _show(records.read(options.record), options.record, options.output)
    if options.operation is None:
        raise UsageError("name an operation, or a record with --record")
    definition = definition_of(options.operation)
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            "timing kernels needs a GPU and torch sees none; without one, "
            f"`make test K={options.operation}` checks them and "
            f"`make inspect K={options.operation}` shows what the compilers made of them"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    plan = plan_of(options, definition)
    record = _run(plan, definition, device)
    path = records.write(record, options.output or results_folder())
    _report(record, [path, *pictures.draw(record, path)])
    if options.tune:
        _tune(record)
    return 1 if _failed(record) else 0


def _parser() -> argparse.ArgumentParser:
    from custom_kernels import registry

    parser = argparse.ArgumentParser(prog="python -m custom_kernels.bench", description=__doc__)
    parser.add_argument("operation", nargs="?", help=f"one of {', '.join(registry.operations())}")
    parser.add_argument(
        "--model", action="append", help="a model of the operation's cases; repeatable"
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="values of M")
    parser.add_argument(
        "--pattern", nargs="+", default=[], help="sparsity patterns, for example 2:4 6:8"
    )
    parser.add_argument("--backend", help="names with commas; default: all that can run here")
    parser.add_argument("--dtype", help="default: the operation's first")
    parser.add_argument("--seconds", type=float, default=0.25, help="device time per shape")
    parser.add_argument("--repetitions", type=int, default=3, help="each with fresh inputs")
    parser.add_argument("--output", type=Path, help="folder for the record and the pictures")
    parser.add_argument(
        "--tune", action="store_true", help="let the operation choose by these results from now on"
    )
    parser.add_argument("--record", type=Path, help="show this record instead of measuring")
    return parser


def definition_of(operation: str) -> ModuleType:
    """The operation's ``cases.py``. Raises UsageError if there is no such operation or it has
    none."""
    from custom_kernels import registry

    if operation not in registry.operations():
        known = ", ".join(registry.operations())
        raise UsageError(f"there is no operation {operation!r}; there are: {known}")
    name = f"custom_kernels.{operation}.cases"
    if importlib.util.find_spec(name) is None:
        raise UsageError(f"{operation} has no cases.py, which says at which shapes to measure it")
    return import_module(name)


def plan_of(options: argparse.Namespace, definition: ModuleType) -> Plan:
    """The command line with every default filled in. Raises UsageError for what is not there."""
    from custom_kernels import registry

    dtype = _known("dtype", [options.dtype or definition.DTYPES[0]], definition.DTYPES)[0]
    backends = None
    if options.backend and options.backend != "all":
        wanted = [name for name in options.backend.split(",") if name]
        backends = _known("backend", wanted, registry.backends(options.operation))
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
    from custom_kernels import registry

    skipped: dict[str, str] = {}
    baselines = []
    for contender in definition.baselines(plan.dtype):
        reason = contender.unavailable(device)
        if reason is None:
            baselines.append(contender)
        elif not baselines and not skipped:
            raise UsageError(f"the baseline {contender.name} cannot run on {device}: {reason}")
        else:
            skipped[contender.name] = reason
    ours = []
    wanted = plan.backends or [
        name for name in registry.backends(plan.operation) if name != REFERENCE
    ]
    for name in wanted:
        try:
            ours.append(contender_of(plan.operation, name, device, plan.dtype, definition))
        except (registry.BackendError, build.BuildError) as error:
            reason = registry.available(plan.operation, name, device) or str(error)
            if plan.backends:
                raise UsageError(f"{name} cannot run on {device}: {reason}") from error
            skipped[name] = reason
    if not ours:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise UsageError(f"no backend of {plan.operation} can run on {device} ({reasons})")
    taken = {contender.name for contender in baselines}
    # A backend may be called like a baseline; then both are shown, and ours says that it is ours.
    named = [_renamed(one, f"{one.name} (ours)") if one.name in taken else one for one in ours]
    return [*baselines, *named], [one.name for one in named], skipped


def contender_of(
    operation: str, backend: str, device: Any, dtype: str, definition: ModuleType
) -> Any:
    """A backend as a contender: the operation's own way to set it up, or its plain call. Raises
    BackendError or BuildError if it cannot run."""
    from custom_kernels import registry, timing

    if (make := getattr(definition, "contender", None)) is not None:
        return make(backend, device, dtype)
    import torch

    # What a backend takes is a matter of its first argument's dtype.
    smallest = next(iter(definition.checks(dtype)))
    first = next(timing.tensors(smallest.empty_inputs(torch.device("cpu"))))
    return timing.Contender(backend, registry.runner(operation, backend, device, first.dtype))


def _renamed(contender: Any, name: str) -> Any:
    from dataclasses import replace

    return replace(contender, name=name)


# --- the run --------------------------------------------------------------------------------------


def _run(plan: Plan, definition: ModuleType, device: Any) -> records.Record:
    import torch
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from custom_kernels import timing

    cases = cases_of(plan, definition)
    screen = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    ) as progress:
        task = progress.add_task("compiling", total=len(cases))
        contenders, ours, skipped = contenders_of(plan, definition, device)
        progress.update(task, description="ceilings")
        limits = timing.ceilings(device, sorted({case.peak for case in cases}))
        exact = import_module(f"custom_kernels.{plan.operation}.reference").exact
        rows: list[dict[str, Any]] = []
        problems: list[str] = []
        settled = False
        for case in cases:
            progress.update(task, description=words(case.labels))
            try:
                if not settled:
                    # The very first measurement of a process ran 8 % faster than all that
                    # followed (a kernel of 4 µs on an H200), so it is thrown away.
                    timing.measure(case, contenders[:1], exact, device, 0.01, 1)
                    settled = True
                measurement = timing.measure(
                    case, contenders, exact, device, plan.seconds, plan.repetitions
                )
            except torch.OutOfMemoryError:
                problems.append(f"{words(case.labels)}: the inputs do not fit on {device}")
            except timing.DeviceLostError as error:
                problems.append(f"{words(case.labels)}: {error}; nothing after it was measured")
                break
            else:
                rows.append(records.row(measurement, limits))
            torch.cuda.empty_cache()
            progress.advance(task)
    return _record(plan, contenders, ours, skipped, limits, rows, problems, device)


def _record(
    plan: Plan,
    contenders: Sequence[Any],
    ours: list[str],
    skipped: dict[str, str],
    limits: Any,
    rows: list[dict[str, Any]],
    problems: list[str],
    device: Any,
) -> records.Record:
    from custom_kernels.timing import clock_warnings

    baseline = contenders[0].name
    failures = problems + [
        f"{words(row['labels'])}: {name}: {one['failure']}"
        for row in rows
        for name, one in row["contenders"].items()
        if "failure" in one
    ]
    return {
        "schema": records.SCHEMA,
        "operation": plan.operation,
        "dtype": plan.dtype,
        "baseline": baseline,
        "backends": ours,
        "baselines": [one.name for one in contenders if one.name not in ours],
        "skipped": skipped,
        "ceilings": asdict(limits),
        "summary": records.summary(rows, baseline),
        "failures": failures,
        "warnings": clock_warnings([row["clocks"] for row in rows]),
        "provenance": _provenance(device, plan),
        "rows": rows,
    }


def words(labels: dict[str, Any]) -> str:
    """``qwen2.5-7b qkv M=16 N=4608 K=3584``."""
    return " ".join(
        f"{name}={value}" if len(name) == 1 else str(value) for name, value in labels.items()
    )


def _failed(record: records.Record) -> bool:
    """Whether something that must work did not: a backend of ours, the named baseline, a whole
    case."""
    must = {record["baseline"], *record["backends"]}
    known = [
        (name, one)
        for row in record["rows"]
        for name, one in row["contenders"].items()
        if "failure" in one
    ]
    return len(record["failures"]) > len(known) or any(name in must for name, _ in known)


# --- the report -----------------------------------------------------------------------------------


def _report(record: records.Record, files: Sequence[Path]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    console.print(records.headline(record), markup=False)
    for name, reason in record["skipped"].items():
        console.print(f"not timed: {name}: {reason}", markup=False)
    console.print(records.table(record))
    for line in records.summary_lines(record):
        console.print(line, markup=False)
    for warning in record["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    for failure in record["failures"]:
        print(f"failed: {failure}", file=sys.stderr)
    for path in files:
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    if command := record["provenance"].get("command"):
        console.print(f"repeat: {command}", markup=False, soft_wrap=True)


def _show(record: records.Record, path: Path, output: Path | None) -> int:
    """Show a record that is there already; its pictures go to ``output`` if that is given."""
    _report(record, pictures.draw(record, output / path.name) if output else [])
    return 0


def _tune(record: records.Record) -> None:
    name = "custom_kernels.tuning"
    adopt = None
    if importlib.util.find_spec(name) is not None:
        adopt = getattr(import_module(name), "adopt", None)
    if adopt is None:
        raise UsageError("--tune: this version keeps no tuning results")
    kept = adopt(record)
    for item in kept if isinstance(kept, (list, tuple)) else [kept]:
        if item is not None:
            print(f"tuned: {item}")


def results_folder() -> Path:
    """Where records go that nobody asked to keep; git ignores it."""
    return (build.checkout() or Path.cwd()) / "benchmarks" / "results"


# --- provenance -----------------------------------------------------------------------------------


def _provenance(device: Any, plan: Plan) -> dict[str, Any]:
    import torch

    commit = _git("rev-parse", "HEAD")
    properties = torch.cuda.get_device_properties(device)
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": plan.command(),
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": _driver(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "git_commit": commit,
        "git_dirty": None if commit is None else _dirty(),
        "locks": _locks(),
        "kernel_source_hash": build.source_hash(),
        "compiled": _compiled(plan, device),
        "tool_chain": _tool_chain(),
    }


def _compiled(plan: Plan, device: Any) -> dict[str, Any]:
    """The libraries of the backends that were timed; they exist, so nothing is compiled here."""
    architecture = build.architecture(device)
    found = {}
    for source in build.sources():
        asked_for = plan.backends is None or source.backend in plan.backends
        if source.operation != plan.operation or not asked_for:
            continue
        try:
            built = build.build(source, (architecture,))
        except build.BuildError:
            continue  # it was not timed either, and is among the skipped
        found[source.name] = {"library": built.path.name, "architectures": built.architectures}
    return found


def _tool_chain() -> dict[str, str]:
    try:
        return build.toolchain().versions()
    except build.BuildError as error:
        return {"missing": str(error)}


def _locks() -> dict[str, str]:
    root = build.checkout()
    files = sorted((root / "locks").glob("*.txt")) if root else []
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver(device: Any) -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output([*query, "-i", str(device.index)])


def _dirty() -> bool | None:
    status = _git("status", "--porcelain", "--untracked-files=all", "--", str(build.PACKAGE))
    return None if status is None else bool(status)


def _git(*arguments: str) -> str | None:
    """What git says of this checkout: no setting of the user's changes it, nor does a hook around
    us that names another repository. None where the package is installed without its checkout."""
    root = build.checkout()
    if root is None:
        return None
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    apart = {
        "HOME": os.devnull, "XDG_CONFIG_HOME": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1",
        "GIT_CEILING_DIRECTORIES": str(root.parent),
    }  # fmt: skip
    command = ["git", "-c", f"safe.directory={root}", "-c", "core.excludesFile=/dev/null"]
    return _output([*command, "-C", str(root), *arguments], kept | apart)


def _output(command: list[str], environment: dict[str, str] | None = None) -> str | None:
    """What a command prints, None where it cannot be had."""
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # who reads our output may stop: `| head`
    sys.exit(main())
