# SPDX-License-Identifier: Apache-2.0
"""All kernels of the package, whatever operations there are, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from custom_kernels import registry
from custom_kernels.compile import build, sources
from custom_kernels.inspect import reports as inspection

COMPILED = pytest.mark.parametrize("backend", registry.compiled(), ids=str)
BACKENDS = [
    pytest.param(one, id=str(one), marks=[pytest.mark.nvcc] if one.kind == "cuda" else [])
    for one in registry.select([])
    if one.kind != "torch"
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_for_every_pinned_architecture_without_spills(
    backend: registry.Backend,
) -> None:
    reports = inspection.inspect(backend)
    if reports:
        wanted = backend.architectures(sources.pinned_architectures())
        assert {report.architecture for report in reports} == set(wanted)
    else:
        # Only a backend that does nothing but call a library has no kernels.
        assert not any("__global__" in path.read_text() for path in sources.files(backend))
    # What its file says to be on purpose is no warning.
    assert inspection.warnings(reports) == []


@COMPILED
@pytest.mark.nvcc
def test_a_small_machine_can_compile_it(backend: registry.Backend) -> None:
    built = build.build(backend, sources.pinned_architectures())
    assert 0 < built.peak_memory < build.PEAK_MEMORY


@COMPILED
@pytest.mark.nvcc
def test_loads_without_a_gpu_and_brings_no_second_cuda_library(
    backend: registry.Backend,
) -> None:
    assert backend.library() is not None
    loaded = {
        Path(line.split()[-1])
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/lib" in line
    }
    for name in sources.libraries(backend):
        copies = {path for path in loaded if path.name.startswith(f"lib{name}.so")}
        assert len(copies) == 1, f"{name}: {copies}"


def test_pinned_architectures_are_those_of_the_pins() -> None:
    assert sources.pinned_architectures() == ("8.0", "9.0a", "10.0a", "12.0a")
