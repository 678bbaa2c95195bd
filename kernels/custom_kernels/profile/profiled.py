# SPDX-License-Identifier: Apache-2.0
"""The process that is profiled: what runs between cudaProfilerStart and cudaProfilerStop."""

import itertools
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from custom_kernels import registry
from custom_kernels.check.case import contender_of
from custom_kernels.command import UsageError
from custom_kernels.compile.toolchain import BuildError
from custom_kernels.profile.choice import Choice

SOURCES = "CUSTOM_KERNELS_PROFILED_SOURCES"
"""Environment variable that names a folder for the sources of RawKernels, which must be there until
ncu has read them."""


@dataclass(frozen=True)
class Launch:
    """One launch of a CuPy kernel, to be profiled in another process."""

    kernel: Any
    """A ``cupy.RawKernel``."""
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: tuple[Any, ...]
    """Numbers as the kernel takes them, and tensors. Of a tensor only shape and dtype are used, so
    its device may be ``meta``: random numbers are in it when the kernel runs."""
    shared: int = 0
    """Bytes of dynamic shared memory per block."""


def run_choice(choice: Choice) -> None:
    """Run one call of a backend.

    Raises:
        UsageError: its library cannot be compiled.
    """
    operation = registry.operation(choice.operation)
    backend = operation.backend(choice.backend)
    if backend.kind == "cupy":
        note_lines()
    device = torch.device("cuda", torch.cuda.current_device())
    case = choice.case()
    try:
        contender = contender_of(backend, device, choice.dtype_name())
    except BuildError as error:
        raise UsageError(str(error)) from error
    inputs = case.empty_inputs(device)
    case.fill(inputs)
    arguments = contender.prepare(inputs)
    _profile(lambda: contender.run(*arguments), device)


def run_launches(file: str) -> None:
    """Run the launches that ``of_launches`` wrote, in their order."""
    note_lines()
    import cupy

    device = torch.device("cuda", torch.cuda.current_device())
    launches: list[Launch] = pickle.loads(Path(file).read_bytes())
    kernels = [_with_lines(launch.kernel) for launch in launches]
    arguments = [
        [
            torch.randn(one.shape, device=device).to(one.dtype)
            if isinstance(one, torch.Tensor)
            else one
            for one in launch.arguments
        ]
        for launch in launches
    ]

    def call() -> None:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream):
            for launch, kernel, own in zip(launches, kernels, arguments, strict=True):
                if launch.shared:
                    kernel.max_dynamic_shared_size_bytes = launch.shared
                values = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in own]
                kernel(launch.grid, launch.block, (*values,), shared_mem=launch.shared)

    _profile(call, device)


def note_lines() -> None:
    """From here on, let every new ``cupy.RawKernel`` be compiled with line information, and its
    source be in a file, where ncu finds it. No instruction changes by that."""
    folder = Path(os.environ[SOURCES])
    # Other sources than ever before: in the user's cache they would stay for nothing. CuPy reads
    # the variable when it is imported.
    os.environ["CUPY_CACHE_DIR"] = str(folder / "compiled")
    import cupy

    numbers = itertools.count()  # several kernels may have one name

    class WithLines(cupy.RawKernel):
        def __init__(
            self, code: str, name: str, options: tuple[str, ...] = (), *rest: Any, **more: Any
        ) -> None:
            file = folder / str(next(numbers)) / f"{name}.cu"
            file.parent.mkdir()
            file.write_text(code)
            located = f"#line 1 {json.dumps(str(file), ensure_ascii=False)}\n{code}"
            super().__init__(located, name, (*options, "-lineinfo"), *rest, **more)

    cupy.RawKernel = WithLines


def _with_lines(kernel: Any) -> Any:
    """The same kernel, made after ``note_lines``."""
    import cupy

    state = kernel.__getstate__()
    if state["code"] is None:  # of a file, which may be a cubin
        return kernel
    kept = ("translate_cucomplex", "enable_cooperative_groups")
    return cupy.RawKernel(
        state["code"],
        state["name"],
        state["options"],
        state["backend"],
        **{name: state[name] for name in kept},
    )


def _profile(call: Callable[[], object], device: torch.device) -> None:
    for _ in range(3):  # compiles, searches, loads modules
        call()
    torch.cuda.synchronize(device)
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize(device)
    torch.cuda.profiler.stop()
