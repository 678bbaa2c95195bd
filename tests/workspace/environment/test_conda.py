# SPDX-License-Identifier: Apache-2.0
"""What ENV=conda and environment.yml ask for, read and solved by conda's own library (py-rattler).

conda-forge itself is asked where it can be reached; elsewhere a channel in a folder stands in, with
what its recipes say (tests/workspace/environment/conda_channel.py).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rattler
import requests
import yaml
from rattler.exceptions import SolverError

from tests.workspace.conftest import closure
from tests.workspace.environment import conda_channel
from workspace.doctor import SECOND_LIBRARY
from workspace.environment import conda, index, lock, uv
from workspace.host.paths import ROOT
from workspace.pins.model import load
from workspace.pins.release import conda_file, selected

VERSIONS = sorted(load().vllm.release)
EACH_RELEASE = pytest.mark.parametrize("version", VERSIONS)
FORGE = "https://conda.anaconda.org/conda-forge"


def described(version: str) -> dict[str, Any]:
    return yaml.safe_load(conda_file(version).read_text())


def specs(version: str) -> list[str]:
    return [entry for entry in described(version)["dependencies"] if isinstance(entry, str)]


def numbers(version: str) -> dict[str, str]:
    """Package → version, as conda's library reads the file."""
    parsed = [rattler.MatchSpec(spec, strict=True) for spec in specs(version)]
    return {str(one).split()[0]: str(one.version).removeprefix("==") for one in parsed}


# --- the file -------------------------------------------------------------------------------------


@EACH_RELEASE
def test_conda_reads_every_entry_as_one_exact_version(version: str) -> None:
    for spec in specs(version):
        parsed = rattler.MatchSpec(spec, strict=True)
        name, number = spec.split("==")
        assert (str(parsed), str(parsed.version)) == (f"{name} =={number}", f"=={number}")


@EACH_RELEASE
def test_the_file_says_what_ENV_conda_asks_for(version: str) -> None:
    assert specs(version) == conda.specs(version)
    assert described(version)["channels"] == [conda.CHANNEL, "nodefaults"]


@EACH_RELEASE
def test_the_python_packages_are_those_of_the_lock(version: str) -> None:
    (section,) = [one for one in described(version)["dependencies"] if isinstance(one, dict)]
    (line,) = section["pip"]
    option, path = line.split()
    assert (option, ROOT / path) == ("--requirement", lock.lock_path(version))
    assert numbers(version)["python"].rpartition(".")[0] == load().python.supported[0]


@EACH_RELEASE
def test_the_cuda_packages_are_those_of_the_wheels(version: str) -> None:
    cuda, conda_s = load().release(version).cuda, numbers(version)
    wheels = {name.removesuffix("-cu12"): number for name, number in cuda.wheels.items()}
    assert conda_s["cuda-version"] == cuda.release
    assert conda_s["cuda-nvcc"] == wheels["nvidia-cuda-nvcc"]
    assert conda_s["cuda-cudart-dev"] == wheels["nvidia-cuda-runtime"]
    assert conda_s["cuda-driver-dev"] == wheels["nvidia-cuda-runtime"]
    assert conda_s["cuda-cccl"] == wheels["nvidia-cuda-cccl"]
    for name, number in conda_s.items():
        if name.startswith("cuda-"):
            assert number == cuda.release or number.startswith(f"{cuda.release}.")


@EACH_RELEASE
def test_what_the_lock_brings_does_not_come_from_conda_too(version: str) -> None:
    locked = re.findall(r"^([\w.-]+)==", lock.lock_path(version).read_text(), re.MULTILINE)
    assert set(numbers(version)) & set(locked) == set()
    assert {"torch", "cmake", "ninja"} <= set(locked)


def test_the_environments_pip_takes_the_lock_with_its_extras(tmp_path: Path) -> None:
    """pip 23.2 does not: in a file with hashes it wants `pydantic[email]` for itself."""
    if selected() != load().vllm.default:
        pytest.skip("the packages to try it with are those of the default release")
    binary = uv.obtain(sys.executable)
    place = tmp_path / "environment"
    subprocess.run([binary, "venv", "-q", "--python", sys.executable, place], check=True)
    pip = f"pip=={load().conda['pip']}"
    command = [binary, "pip", "install", "-q", "--python", place / "bin" / "python", pip]
    subprocess.run(command, check=True, env=os.environ | index.uv_environment())
    roots = ["fastapi-cloud-cli", "fastar", "rignore", "email-validator", "httptools", "uvloop"]
    roots += ["watchfiles", "websockets", "python-dotenv", "pyyaml"]
    text = lock.lock_path(load().vllm.default).read_text()
    (tmp_path / "lock.txt").write_text(lock.split(text, sorted(closure(roots)))[1])
    result = subprocess.run(
        [place / "bin" / "pip", "install", "--dry-run", "-q", "-r", tmp_path / "lock.txt"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


# --- do the versions go together? -----------------------------------------------------------------


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> str:
    return conda_channel.describe(tmp_path_factory.mktemp("records") / "channel")


@EACH_RELEASE
def test_the_solver_finds_one_cuda_release_by_the_recipes_rules(version: str, channel: str) -> None:
    chosen = conda_channel.solve(specs(version), channel)
    assert chosen.items() >= numbers(version).items()
    release = load().release(version).cuda.release
    of_cuda = {name: number for name, number in chosen.items() if name.startswith("cuda-")}
    assert len(of_cuda) > 15
    assert {".".join(number.split(".")[:2]) for number in of_cuda.values()} == {release}
    compilers = ("gcc", "gcc_linux-64", "gxx_linux-64", "gxx_impl_linux-64")
    assert {chosen[name] for name in compilers} == {load().conda["gxx"]}


def test_a_compiler_of_another_release_is_refused_by_the_solver(channel: str) -> None:
    mixed = [one for one in specs(load().vllm.default) if not one.startswith("cuda-nvcc==")]
    with pytest.raises(SolverError, match=r"cuda-version"):
        conda_channel.solve([*mixed, "cuda-nvcc==13.2.86"], channel)


def test_a_host_compiler_too_new_for_nvcc_is_refused_by_the_solver(channel: str) -> None:
    newer = [one for one in specs("0.13.0") if not one.startswith("gxx==")]
    with pytest.raises(SolverError, match=r"gcc_impl"):
        conda_channel.solve([*newer, "gxx==15.2.0"], channel)


@EACH_RELEASE
def test_of_cudas_libraries_only_the_runtime_comes_with_nvcc(version: str, channel: str) -> None:
    """conda's Python looks into conda's lib for whatever names no place of its own, so no second
    cuBLAS or nvJitLink may lie there; the runtime that nvcc brings is that of the wheels."""
    chosen = conda_channel.solve(specs(version), channel)
    assert [name for name in chosen if SECOND_LIBRARY.match(name)] == []
    cuda = load().release(version).cuda
    runtime = [number for name, number in cuda.wheels.items() if "cuda-runtime" in name]
    assert [chosen["cuda-cudart"]] == runtime


@EACH_RELEASE
def test_conda_forge_solves_the_file(version: str) -> None:
    """The one check that asks conda-forge itself."""
    try:
        requests.head(f"{FORGE}/noarch/repodata.json.zst", timeout=10).raise_for_status()
    except requests.RequestException as error:
        pytest.skip(f"conda-forge is out of reach ({type(error).__name__}): never solved here")
    chosen = conda_channel.solve(specs(version), FORGE)
    assert chosen.items() >= numbers(version).items()
    assert [name for name in chosen if SECOND_LIBRARY.match(name)] == []
