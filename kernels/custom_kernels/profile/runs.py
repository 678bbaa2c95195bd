# SPDX-License-Identifier: Apache-2.0
"""Profile a backend, kernels of a notebook, or any program."""

import datetime
import os
import pickle
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from custom_kernels import registry
from custom_kernels.bench.plan import backend_names, known
from custom_kernels.bench.record import label_text, results_folder
from custom_kernels.command import UsageError
from custom_kernels.profile import figures, ncu, records, source, text
from custom_kernels.profile.choice import Choice
from custom_kernels.profile.figures import Profile
from custom_kernels.profile.profiled import SOURCES, Launch
from custom_kernels.profile.records import Recorded

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Run:
    """Profiles of one call of a backend. ``rich`` prints it as ``make profile`` does."""

    profiles: tuple[Profile, ...]
    """Of the kernels that the call launched, in their order."""
    now: Recorded
    last: Recorded | None
    """The run before this one, of the same backend and case on the same GPU model."""
    report: Path
    """ncu's, for ``ncu-ui``."""

    def __rich__(self) -> "Group":
        from rich.console import Group

        reports = map(text.report, self.profiles)
        return Group(text.table(self.profiles), *reports, "", text.against(self.last, self.now))


def of_backend(
    operation: str,
    backend: str | None = None,
    *,
    model: str | None = None,
    layer: str | None = None,
    tokens: int = 4096,
    pattern: str | None = None,
    dtype: str | None = None,
    output: Path | None = None,
) -> Run:
    """Profile one call of a backend, in a process of its own, and keep the figures for the next.

    In a notebook, ``rich.print(profile.of_backend("gemm", "triton", tokens=16))`` shows what
    ``make profile K=gemm.triton M=16`` does.

    Args:
        backend: default: the best for the device.
        model, layer, tokens, pattern, dtype: the case; tokens is M. Defaults as in ``Choice``.
        output: folder for ncu's report; default: ``benchmarks/results``.

    Raises:
        UsageError: there is no GPU, no ``ncu`` or no such case, or ncu failed; its reason.
    """
    if not torch.cuda.is_available():
        raise UsageError(
            "profiling needs a GPU and torch sees none; without one, "
            f"`make inspect K={operation}` shows registers, occupancy and instructions"
        )
    ncu.find()  # before anything is compiled
    choice = Choice(operation, backend or "", model, layer, tokens, pattern, dtype)
    case = choice.case()
    if not choice.backend:
        device = torch.device("cuda", torch.cuda.current_device())
        first = next(iter(case.empty_inputs(torch.device("meta"))))
        best = registry.operation(operation).best(device, first.dtype).name
        choice = replace(choice, backend=best)
    known("backend", [choice.backend], backend_names(operation))
    labels = label_text(case.labels)
    print(f"profiling {operation}.{choice.backend} at {labels}", flush=True)
    folder = output or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H%M%SZ")
    slug = re.sub(r"[^\w.-]+", "-", labels)
    report = folder / f"profile-{operation}-{choice.backend}-{slug}-{stamp}.ncu-rep"
    command = [sys.executable, "-m", "custom_kernels.profile", *choice.words()]
    profiles = of_command([*command, "--child"], report)
    if not profiles:
        raise UsageError(f"no kernel ran in the profiled call; ncu's report is {report}")
    named = {f"{number} {one.kernel}": one for number, one in enumerate(profiles, 1)}
    now = records.made_here(named, " ".join(["python", *command[1:]]))
    last = records.exchange(f"{operation}-{choice.backend}-{choice.dtype_name()}-{labels}", now)
    return Run(tuple(profiles), now, last, report)


def of_launches(launches: Sequence[Launch], report: Path) -> list[Profile]:
    """Profile launches of CuPy kernels in a process of their own.

    Args:
        report: where ncu's report goes, for ``ncu-ui``; its folder exists.

    Returns:
        A profile for each.

    Raises:
        UsageError: there is no ``ncu``, or it failed; its reason.
    """
    code = "import sys; from custom_kernels import profile; profile.run_launches(sys.argv[1])"
    sent = [
        replace(
            launch,
            arguments=tuple(
                one.to("meta") if isinstance(one, torch.Tensor) else one for one in launch.arguments
            ),
        )
        for launch in launches
    ]
    with tempfile.NamedTemporaryFile() as file:
        file.write(pickle.dumps(sent))
        file.flush()
        return of_command([sys.executable, "-P", "-c", code, file.name], report)


def of_command(command: Sequence[str], report: Path) -> list[Profile]:
    """Profile what a program launches between ``torch.cuda.profiler.start()`` and ``stop()``."""
    program = ncu.find()
    with tempfile.TemporaryDirectory(prefix="profiled-") as sources:
        ncu.run(program, report, command, {**os.environ, SOURCES: sources})
        found = figures.parse(ncu.raw_page(program, report))
        return [
            replace(one, lines=source.parse(ncu.source_page(program, report, number)))
            for number, one in enumerate(found)
        ]
