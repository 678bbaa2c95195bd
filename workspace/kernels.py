# SPDX-License-Identifier: Apache-2.0
"""`make kernels`: compile what changed, for every pinned GPU architecture."""

from __future__ import annotations

import sys

from custom_kernels import registry
from custom_kernels.compile import build, jobs
from custom_kernels.compile.toolchain import BuildError, NoCompiler

from workspace.host.errors import WorkspaceError
from workspace.host.text import say
from workspace.pins.model import load


def architectures(asked: str | None) -> list[str]:
    """ARCH= as a list, checked against the pinned architectures."""
    pinned = load().cuda.architectures
    wanted = (asked or "").replace(",", " ").split()
    for name in wanted:
        if name not in pinned:
            raise WorkspaceError(
                f"ARCH={name} is not a pinned architecture; use one of {', '.join(pinned)} "
                "(pins.toml, [cuda])"
            )
    return wanted or pinned


def compile_for_device(device: str, operation: str | None = None) -> None:
    """Compile the kernels (of `operation`, if given) that lack a library for this machine's GPUs;
    on a CPU none.

    Raises:
        WorkspaceError: as for `compile_all`.
    """
    if device == "cpu":
        return
    from workspace.fork.build import gpus

    for arch in sorted(set(gpus())):
        wanted = [
            backend
            for backend in registry.compiled()
            if operation in (None, backend.operation.name) and backend.architectures([arch])
        ]
        try:
            complete = all(build.existing(backend, arch) for backend in wanted)
        except BuildError:
            complete = False  # `compile_all` reports the reason
        if not complete:
            compile_all([arch], operation)


def compile_all(architectures: list[str], operation: str | None = None) -> None:
    """Compile every kernel (of `operation`, if given) that changed, and print which.

    Without nvcc, kernels in CUDA C++ are skipped with a message if the packages of the release do
    not include it.

    Raises:
        WorkspaceError: no tool chain, or a compiler failed; its messages were printed.
    """

    def report(built: build.Built) -> None:
        if built.compiled:
            spilled = sum(kernel.spill_stores + kernel.spill_loads for kernel in built.kernels)
            say(
                f"compiled {built.backend} for {', '.join(built.architectures)} "
                f"in {built.seconds:.1f} s, {built.peak_memory / jobs.GIB:.1f} GiB"
                + (f", {spilled} bytes spilled" if spilled else "")
            )

    try:
        build.build_all(architectures, progress=report, operation=operation)
    except BuildError as error:
        if isinstance(error, NoCompiler) and not load().release().cuda.packages_hold_nvcc:
            say(f"skipping kernels in CUDA C++: {error}")
            return
        first, _, rest = str(error).partition("\n")
        if rest:
            print(rest, file=sys.stderr)
        raise WorkspaceError(first) from None
