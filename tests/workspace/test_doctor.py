# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from custom_kernels.compile import toolchain

from workspace import doctor
from workspace.environment.imports import Imports, probe
from workspace.fork import built_from
from workspace.fork.built_from import Manifest
from workspace.host.paths import LOCKS, ROOT
from workspace.pins.model import load
from workspace.pins.release import selected, tree

VERSION = selected()
needs_dev = pytest.mark.skipif(
    not (Path(sys.prefix) / f"workspace-{VERSION}.json").exists(), reason="run make dev first"
)


@pytest.fixture(scope="module")
def seen() -> Imports:
    return probe(tree())


def row(rows: list[doctor.Check], name: str) -> doctor.Check:
    return next(row for row in rows if row.name == name)


@needs_dev
def test_this_checkout_is_usable_and_says_from_where(doctors_rows: list[doctor.Check]) -> None:
    rows = doctors_rows
    assert [r for r in rows if r.status == "problem"] == []
    assert "editable from vllm-fork/releases/" in row(rows, "vLLM").detail
    assert load().release().cuda.release in row(rows, "CUDA release").detail
    assert "patches applied" in row(rows, "fork").detail


@needs_dev
def test_the_json_is_the_same_answer() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "workspace", "doctor"],
        cwd=ROOT, env=os.environ | {"JSON": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    answer = json.loads(result.stdout)
    assert answer["usable"] is (result.returncode == 0)
    assert {"name", "status", "detail", "remedy"} == set(answer["checks"][0])


def test_the_library_for_this_cpu_is_the_one_that_vllm_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    three = {"_C.abi3.so", "_C_AVX512.abi3.so", "_C_AVX2.abi3.so"}
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    wide = {"avx2", "avx512f", "avx512bw", "avx512vl", "avx512dq"}
    for flags, name in (
        ({"avx2"}, "_C_AVX2.abi3.so"),
        (wide, "_C_AVX512.abi3.so"),
        (wide | {"avx512_bf16"}, "_C.abi3.so"),
    ):
        monkeypatch.setattr(doctor, "cpu_flags", lambda flags=flags: flags)
        assert doctor.cpu_library(three) == name
        assert doctor.cpu_library({"_C.abi3.so"}) == "_C.abi3.so"  # 0.13.0 has one for all


@needs_dev
def test_a_cpu_that_cannot_run_the_engine_is_named(
    monkeypatch: pytest.MonkeyPatch, seen: Imports
) -> None:
    if platform.machine() != "x86_64" or doctor.device() != "cpu":
        pytest.skip("of x86_64 CPUs, where vLLM runs on the CPU")
    monkeypatch.setattr(doctor, "cpu_flags", lambda: {"sse4_2"})
    check = doctor.vllm(seen)
    assert check.status == "problem"
    assert "AVX2" in check.detail


@pytest.mark.parametrize(("release", "status"), [("0.13.0", "note"), ("0.25.1", "problem")])
def test_a_missing_nvcc_is_a_problem_where_packages_hold_one(
    monkeypatch: pytest.MonkeyPatch, release: str, status: str
) -> None:
    def none() -> None:
        raise toolchain.NoCompiler("there is no nvcc")

    monkeypatch.setattr(toolchain, "find", none)
    check = doctor.nvcc(load().release(release))
    assert check.status == status
    assert check.remedy


@pytest.mark.parametrize("step", [doctor.kernels, lambda: doctor.nvcc(load().release())])
def test_why_the_kernels_package_cannot_be_imported_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, step: Callable[[], object]
) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("no such symbol")

    monkeypatch.setitem(sys.modules, "custom_kernels.compile", Broken("custom_kernels.compile"))
    with pytest.raises(RuntimeError, match="no such symbol"):
        step()


def test_components_of_another_cuda_release_are_found() -> None:
    components = {"nvidia-cuda-nvcc": "13.2.86", "nvidia-cuda-runtime": "13.0.96", "absent": None}
    assert doctor.mixed_components(components, "13.0") == {"nvidia-cuda-nvcc": "13.2.86"}


def test_a_mixed_tool_chain_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    release = load().release()
    mixed = {**release.cuda.wheels, "nvidia-cuda-crt": "13.5.37"}
    monkeypatch.setattr(doctor, "cuda_components", lambda _release: mixed)
    check = doctor.cuda_release(release, "uv")
    assert check.status == "problem"
    assert "nvidia-cuda-crt 13.5.37" in check.detail
    assert "make lock" in check.remedy
    assert doctor.cuda_release(release, "system").status == "note"


def test_a_package_off_the_lock_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Imports
) -> None:
    changed = tmp_path / "lock.txt"
    text = (LOCKS / f"vllm-{VERSION}.txt").read_text()
    changed.write_text(text.replace(f"triton=={load().release().triton}", "triton==0.0.1"))
    monkeypatch.setattr(doctor, "lock_files", lambda _pins, _device: [changed])
    check = doctor.packages("uv", seen)
    assert check.status == "problem"
    assert "triton" in check.detail


@needs_dev
@pytest.mark.parametrize(
    ("manifest", "says"),
    [(Manifest(), "binaries missing"), (Manifest(device="cuda"), "not cpu")],
)
def test_wrong_binaries_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, seen: Imports, manifest: Manifest, says: str
) -> None:
    monkeypatch.setattr(built_from, "read_manifest", lambda: manifest)
    monkeypatch.setattr(doctor, "device", lambda: "cpu")
    check = doctor.vllm(seen)
    assert (check.status, check.remedy) == ("problem", "make dev")
    assert says in check.detail


def test_a_check_that_breaks_is_a_problem_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_seen: Imports) -> doctor.Check:
        raise RuntimeError("as if the driver had gone")

    monkeypatch.setattr(doctor, "vllm", broken)
    rows = doctor.checks("uv")
    assert row(rows, "vLLM").status == "problem"
    assert "as if the driver had gone" in row(rows, "vLLM").detail
    assert rows[-1].name == "kernels"


def test_every_problem_has_a_remedy(doctors_rows: list[doctor.Check]) -> None:
    for check in doctors_rows:
        assert check.status != "problem" or check.remedy


def test_which_files_are_loaded_with_a_bundles_torch_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = doctor.torch_libraries()
    assert check.status == "ok"
    assert f"from {Path(sys.prefix).resolve()}: " in check.detail
    assert "torch_cuda" in check.detail
    (library,) = Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/lib/libcudnn.so.*")
    (tmp_path / library.name).touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    check = doctor.torch_libraries()
    assert check.status == "problem"
    assert f"{tmp_path} is on LD_LIBRARY_PATH and precedes" in check.detail
