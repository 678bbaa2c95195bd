# SPDX-License-Identifier: Apache-2.0
"""Compiling: content-addressed, only what changed, and nothing half ever taken for whole."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from custom_kernels import paths, registry
from custom_kernels.compile import build, ptx, toolchain
from custom_kernels.compile.toolchain import BuildError, NoCompiler

from tests.kernels.conftest import PackageCopy

pytestmark = pytest.mark.nvcc
ARCHITECTURE = "8.0"

# Without tvm-ffi's headers, so that it compiles in a second or two.
TOY = """
#include "scale.cuh"
__global__ void toy(float* y) { y[threadIdx.x] *= SCALE; }
extern "C" int answer() { return 42; }
"""


@pytest.fixture
def toy(package_copy: PackageCopy, monkeypatch: pytest.MonkeyPatch) -> PackageCopy:
    """An operation ``toy`` with one backend that includes a header, seen by this process too."""
    package_copy.add("toy/__init__.py", "")
    package_copy.add("toy/reference.py", "")
    package_copy.add("toy/scale.cuh", "#define SCALE 2.f\n")
    package_copy.add("toy/cuda.cu", TOY)
    monkeypatch.setattr(paths, "PACKAGE", package_copy.package)
    monkeypatch.setenv("CUSTOM_KERNELS_CACHE", str(package_copy.cache))
    return package_copy


def _library() -> Path:
    (backend,) = registry.compiled()
    return build.library_path(backend, [ARCHITECTURE])


def test_only_what_changed_is_rebuilt(toy: PackageCopy) -> None:
    toy.add("toy/other.cu", 'extern "C" int other() { return 1; }\n')
    first = {item.backend.name: item for item in build.build_all([ARCHITECTURE])}
    assert [item.compiled for item in first.values()] == [True, True]
    assert ctypes.CDLL(str(first["cuda"].path)).answer() == 42

    assert not any(item.compiled for item in build.build_all([ARCHITECTURE]))

    toy.add("toy/scale.cuh", "#define SCALE 3.f\n")  # only cuda.cu includes it
    second = {item.backend.name: item for item in build.build_all([ARCHITECTURE])}
    assert second["cuda"].compiled
    assert not second["other"].compiled

    toy.add("toy/scale.cuh", "#define SCALE 2.f\n")  # back again: the first library is still there
    third = {item.backend.name: item for item in build.build_all([ARCHITECTURE])}
    assert not third["cuda"].compiled
    assert third["cuda"].path == first["cuda"].path


def test_the_name_holds_flags_tools_and_architectures(
    toy: PackageCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    (backend,) = registry.compiled()
    names = {build.library_path(backend, [ARCHITECTURE]), build.library_path(backend, ["9.0a"])}
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DEXTRA"))
    names.add(_library())
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-DMORE")
    names.add(_library())
    versions = {**toolchain.find().versions(), "nvcc": "99.0"}
    monkeypatch.setattr(toolchain.Toolchain, "versions", lambda self: versions)
    names.add(_library())
    assert len(names) == 5


def test_the_report_says_what_the_kernel_takes(toy: PackageCopy) -> None:
    (built,) = build.build_all([ARCHITECTURE])
    (kernel,) = built.kernels
    assert kernel.name == "toy"
    assert kernel.architecture == ARCHITECTURE
    assert 0 < kernel.registers < 64
    assert kernel.spill_stores == kernel.spill_loads == 0
    assert 10 * 2**20 < built.peak_memory < build.PEAK_MEMORY
    report = json.loads(built.path.with_suffix(".json").read_text())
    assert report["peak_memory"] == built.peak_memory
    assert report["seconds"] > 0


def test_what_ptxas_warns_of_is_the_kernels() -> None:
    log = """\
ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized \
due to non wgmma instructions reading accumulator registers of  a wgmma between start and end of \
the pipeline stage in the function 'one'
ptxas info    : Compiling entry function 'one' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
ptxas info    : Compiling entry function 'other' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers
"""
    one, other = ptx.parse_ptxas(log)
    assert one.loss.startswith("wgmma.mma_async instructions are serialized due to non wgmma")
    assert one.loss.endswith("pipeline stage")
    assert other.loss == ""


def test_several_architectures_compile_in_a_folder_of_any_name_and_leave_nothing_elsewhere(
    toy: PackageCopy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    environment = toy.root.parent / "environment"
    environment.symlink_to(sys.prefix)

    def in_it(path: Path) -> Path:
        return environment / path.relative_to(sys.prefix)

    tools = toolchain.find()
    if tools.origin == "packages":
        monkeypatch.setattr(toolchain, "find", lambda: replace(
            tools, nvcc=in_it(tools.nvcc), tvm_ffi=in_it(tools.tvm_ffi),
            include=tuple(map(in_it, tools.include)), library=tuple(map(in_it, tools.library)),
        ))  # fmt: skip
    toy.add(
        "toy/scale.cuh", "#include <tvm/ffi/c_api.h>\n#include <cuda_fp16.h>\n#define SCALE 2.f\n"
    )
    toy.add("toy/cuda.cu", TOY.replace("scale.cuh", "toy/scale.cuh"))
    (backend,) = registry.compiled()
    built = build.build(backend, [ARCHITECTURE, "9.0a"], threads=2)
    assert {kernel.architecture for kernel in built.kernels} == {ARCHITECTURE, "9.0a"}
    assert [path.name for path in tmp_path.iterdir()] == ["my work (1) ü"]


def test_a_compiler_that_the_system_killed_says_what_to_do(
    toy: PackageCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the kernel does when memory runs out.
    killed = toy.add("killed", '#!/bin/sh\ncase "$*" in *-E*) exec g++ "$@";; esac\nkill -9 $$\n')
    killed.chmod(0o755)
    tools = replace(toolchain.find(), cxx=killed)
    monkeypatch.setattr(toolchain, "find", lambda: tools)
    (backend,) = registry.compiled()
    for architectures in ([ARCHITECTURE], [ARCHITECTURE, "9.0a"]):
        with pytest.raises(BuildError, match=r"cuda\.cu was killed .* out of memory"):
            build.build(backend, architectures, threads=2)


def test_an_error_is_shown_as_the_compiler_gives_it(toy: PackageCopy) -> None:
    toy.add("toy/cuda.cu", "\n\n__global__ void broken() { undefined_thing(); }\n")
    with pytest.raises(BuildError, match=r"cuda\.cu\(3\): error: .*undefined_thing"):
        build.build_all([ARCHITECTURE])
    assert not list(toy.cache.glob("*.so"))
    assert not list(toy.cache.glob("*.tmp"))


def test_killed_at_random_times_nothing_half_is_taken_for_whole(toy: PackageCopy) -> None:
    command = [sys.executable, "-m", "custom_kernels.compile", "--arch", ARCHITECTURE]
    chance = random.Random()
    for attempt in range(6):
        process = subprocess.Popen(
            command,
            env=toy.environment(),
            cwd=toy.root,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(chance.uniform(0.1, 1.6))
        # Now and then the compiler outlives the builder.
        (os.kill if attempt % 2 else os.killpg)(process.pid, signal.SIGKILL)
        process.wait()
        for library in toy.cache.glob("*.so"):
            assert ctypes.CDLL(str(library)).answer() == 42
            assert library.with_suffix(".json").is_file()
            library.unlink()
    result = toy.python("-m", "custom_kernels.compile", "--arch", ARCHITECTURE)
    assert result.returncode == 0, result.stderr
    assert ctypes.CDLL(str(_library())).answer() == 42
    assert not list(toy.cache.glob("*.tmp"))


def test_two_builders_compile_once(toy: PackageCopy) -> None:
    (backend,) = registry.compiled()
    results: list[build.Built] = []
    threads = [
        threading.Thread(target=lambda: results.append(build.build(backend, [ARCHITECTURE])))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(item.compiled for item in results) == [False, True]


def test_a_source_that_changes_while_it_compiles_is_not_stored(
    toy: PackageCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build._run_nvcc

    def edit_meanwhile(*arguments: Any) -> Any:
        result = run(*arguments)
        toy.add("toy/scale.cuh", "#define SCALE 5.f\n")
        return result

    monkeypatch.setattr(build, "_run_nvcc", edit_meanwhile)
    with pytest.raises(BuildError, match=r"changed while it was compiled"):
        build.build_all([ARCHITECTURE])
    assert not list(toy.cache.glob("*.so"))


def test_a_missing_tool_is_one_clear_error(
    toy: PackageCopy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    toolchain.find.cache_clear()
    try:
        with pytest.raises(BuildError, match=r"no C\+\+ compiler: install g\+\+"):
            build.build_all([ARCHITECTURE])
        monkeypatch.setattr(toolchain, "_cuda_packages", list)
        for variable in ("CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(variable, raising=False)
        with pytest.raises(BuildError, match=r"no nvcc in this environment.*make dev"):
            build.build_all([ARCHITECTURE])
    finally:
        toolchain.find.cache_clear()


def test_a_compiler_of_another_cuda_release_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "bin" / "nvcc"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    other.chmod(0o755)
    monkeypatch.setattr(toolchain, "_cuda_packages", list)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for runtime, remedy in (
        ("13.0", "make dev"),
        ("12.8", "no package of it for CUDA 12.8; set CUDA_HOME"),
    ):
        monkeypatch.setattr(toolchain, "packaged_runtime", lambda runtime=runtime: runtime)
        toolchain.find.cache_clear()
        with pytest.raises(
            NoCompiler, match=rf"CUDA 11\.8\.89, .* runtime of {runtime}: .*{remedy}"
        ):
            toolchain.find()
    toolchain.find.cache_clear()


@pytest.mark.parametrize(
    ("there", "found"),
    [
        (("cu13/include", "cusparselt/lib", "nccl/lib"), ["cu13", "cusparselt"]),
        (
            ("cublas/lib", "cuda_runtime/include", "cusparselt/lib", "notes"),
            ["cublas", "cuda_runtime", "cusparselt"],
        ),
    ],
)
def test_packages_are_found_as_cuda_13_and_as_cuda_12_lay_them_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: tuple[str, ...], found: list[str]
) -> None:
    for folder in there:
        (tmp_path / "nvidia" / folder).mkdir(parents=True)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda _name: spec)
    assert [folder.name for folder in toolchain._cuda_packages()] == found


def test_a_cache_that_cannot_be_written_is_one_clear_error(
    toy: PackageCopy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUSTOM_KERNELS_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(
        BuildError, match=r"cannot write compiled kernels to .*CUSTOM_KERNELS_CACHE"
    ):
        build.build_all([ARCHITECTURE])


def test_with_nothing_to_do_nothing_is_compiled_and_torch_not_imported() -> None:
    build.build_all()
    program = (
        "import sys; from custom_kernels.compile import build; "
        "print(any(one.compiled for one in build.build_all()), 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False False"
