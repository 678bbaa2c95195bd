# SPDX-License-Identifier: Apache-2.0
"""All CUDA code of the package, whatever operations there are, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from custom_kernels import build

SOURCES = pytest.mark.parametrize("source", build.sources(), ids=lambda source: source.name)


@SOURCES
def test_compiles_for_every_pinned_architecture_without_spills(source: build.Source) -> None:
    pinned = build.pinned_architectures()
    built = build.build(source, pinned)
    if any("__global__" in path.read_text() for path in source.files()):
        assert {kernel.architecture for kernel in built.kernels} == set(pinned)
    spilled = [kernel for kernel in built.kernels if kernel.spill_stores or kernel.spill_loads]
    assert not spilled


@SOURCES
def test_loads_without_a_gpu_and_brings_no_second_cuda_library(source: build.Source) -> None:
    module = build.load(source.operation, source.backend)
    assert module is not None
    loaded = {
        Path(line.split()[-1])
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/lib" in line
    }
    for name in source.libraries():
        copies = {path for path in loaded if path.name.startswith(f"lib{name}.so")}
        assert len(copies) == 1, f"{name}: {copies}"


def test_pinned_architectures_are_those_of_the_pins() -> None:
    assert build.pinned_architectures() == ("8.0", "9.0a", "10.0a", "12.0a")
