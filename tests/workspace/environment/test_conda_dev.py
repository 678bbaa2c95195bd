# SPDX-License-Identifier: Apache-2.0
"""`make dev ENV=conda` on a small checkout: conda's solver and installer, a channel in a folder.

Real are conda's library, nvcc, uv, the small lock and everything that make does. In place of
conda-forge's packages are those of conda_channel.py beside this file, and in place of micromamba a
short command with conda's library underneath: what micromamba itself does is not shown here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.workspace.conftest import Checkout, copy_checkout
from tests.workspace.environment import conda_channel
from workspace.environment import conda
from workspace.host.plain_path import plain
from workspace.pins.model import load

pytestmark = pytest.mark.skipif(
    not conda_channel.can_make_python(),
    reason="a Python with its own prefix and shared library is needed to make conda's from",
)
RELEASE = load().vllm.default


@pytest.fixture(scope="module")
def tool(_small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH with the command (where there is a small checkout to use it on)."""
    folder = tmp_path_factory.mktemp("conda")
    records = conda_channel.describe(folder / "records")
    chosen = conda_channel.solve(conda.specs(RELEASE), records)
    channel = conda_channel.pack(folder / "channel", {*chosen.items(), ("ccache", "4.3")})
    return conda_channel.command(folder / "bin", channel)


def with_conda(checkout: Checkout, tool: Path) -> Checkout:
    # PYTHON= is for the interpreter of the other environments.
    mine = {"PATH": f"{tool}:{checkout.env['PATH']}", "PYTHON": "", "ENV": "conda"}
    return Checkout(checkout.root, checkout.env | mine)


@pytest.fixture(scope="module")
def made(_small_template: Path, tool: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A small checkout in which `make dev ENV=conda` has run."""
    folder = tmp_path_factory.mktemp("made")
    checkout = with_conda(copy_checkout(_small_template, folder), tool)
    # Kernels of its own: those of the other tests were compiled by the packages' nvcc.
    checkout.env["CUSTOM_KERNELS_CACHE"] = str(folder / "kernels")
    result = checkout.make("dev")
    assert result.returncode == 0, result.stdout
    return checkout


def python(checkout: Checkout, code: str, environment: str = ".conda", **env: str) -> str:
    """Run `code` as a verb would, with a plain name for the environment."""
    result = subprocess.run(
        [plain(checkout.root) / environment / "bin" / "python", "-c", code],
        cwd=checkout.root, env=checkout.env | env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_conda_makes_the_environment_and_uv_puts_the_lock_into_it(made: Checkout) -> None:
    rows = doctor(made)
    assert rows["Python"]["detail"].endswith(", .conda")
    assert rows["packages"]["status"] == "ok", rows["packages"]
    nvcc = load().release().cuda.conda["cuda-nvcc"]
    assert rows["nvcc"]["detail"].startswith(f"{nvcc} of this environment")
    assert rows["kernels"]["status"] == "ok", rows["kernels"]


def doctor(checkout: Checkout, **env: str) -> dict[str, dict[str, str]]:
    # The small lock has no torch, so the answer as a whole is no, and make adds a line of its own.
    answer, _ = json.JSONDecoder().raw_decode(checkout.make("doctor", "JSON=1", **env).stdout)
    return {row["name"]: row for row in answer["checks"]}


def test_the_doctor_names_what_is_not_as_pinned_or_comes_in_front_of_torch(made: Checkout) -> None:
    assert doctor(made)["conda"]["status"] == "ok"
    prefix = made.root / ".conda"
    row = doctor(made, LD_LIBRARY_PATH=f"/elsewhere:{prefix}/lib")["conda"]
    assert (row["status"], row["remedy"]) == ("problem", "unset LD_LIBRARY_PATH")
    records = prefix / "conda-meta"
    nccl, ccache = records / "nccl-2.28.9-0.json", next(records.glob("ccache-*.json"))
    text = ccache.read_text()
    try:
        nccl.write_text('{"name": "nccl", "version": "2.28.9"}')
        row = doctor(made)["conda"]
        assert row["detail"] == "nccl: duplicates of libraries of pip's torch"
        assert row["remedy"] == shlex.join(["conda", "remove", "-p", str(prefix), "nccl"])
        ccache.write_text(text.replace(f'"{load().conda["ccache"]}"', '"4.9"'))
        assert doctor(made)["conda"]["detail"] == "differ from pins.toml: ccache 4.9"
    finally:
        nccl.unlink()
        ccache.write_text(text)


def test_a_second_run_has_nothing_to_do(made: Checkout) -> None:
    result = made.make("dev")
    assert result.returncode == 0
    assert "creating" not in result.stdout
    assert "installing" not in result.stdout


DISTRIBUTIONS = """
from importlib import metadata
for one in metadata.distributions():
    print(one.metadata["Name"].lower().replace("_", "-"), one.version)
"""


def test_conda_and_uv_make_environments_of_the_same_packages(
    made: Checkout, ready_checkout: Checkout
) -> None:
    ours = set(python(made, DISTRIBUTIONS).splitlines())
    theirs = set(python(ready_checkout, DISTRIBUTIONS, ".venv").splitlines())
    assert ours == theirs
    assert len(ours) > 30


def test_kernels_are_compiled_by_condas_nvcc_with_the_headers_beside_it(made: Checkout) -> None:
    code = """
from custom_kernels.compile import build, toolchain
tools = toolchain.find()
print(tools.origin, tools.nvcc, tools.cxx, *tools.include, sep="\\n")
print(len(build.build_all(force=True)))
"""
    origin, nvcc, cxx, *rest = python(made, code).splitlines()
    *include, built = rest
    prefix = plain(made.root) / ".conda"
    assert (origin, nvcc) == ("conda", f"{prefix}/bin/nvcc")
    assert cxx == f"{prefix}/bin/x86_64-conda-linux-gnu-g++"
    assert f"{prefix}/{conda_channel.TARGET}/include" in include
    assert built == "1"


def test_condas_nvcc_needs_no_headers_of_the_packages(made: Checkout, tmp_path: Path) -> None:
    """Its profile leads it to the target's folder."""
    source = tmp_path / "scale.cu"
    source.write_text("#include <cub/cub.cuh>\n__global__ void f(float *x) { *x *= 2; }\n")
    prefix = plain(made.root) / ".conda"
    nvcc = [prefix / "bin" / "nvcc", "-arch=sm_90a"]
    path = {"PATH": "/usr/bin:/bin"}
    subprocess.run([*nvcc, "-cubin", source, "-o", tmp_path / "f.cubin"], env=path, check=True)
    assert (tmp_path / "f.cubin").read_bytes().startswith(b"\x7fELF")
    used = subprocess.run(
        [*nvcc, "-M", source], env=path, capture_output=True, text=True, check=True
    )
    assert f"{prefix}/bin/../{conda_channel.TARGET}/include/cuda_runtime.h" in used.stdout
    assert "site-packages" not in used.stdout


CMAKE = r"""
cmake_minimum_required(VERSION 3.26)
project(p LANGUAGES CXX CUDA)
find_package(CUDAToolkit REQUIRED)
message("version ${CUDAToolkit_VERSION}")
foreach(name cudart cublas)
  get_target_property(place CUDA::${name} IMPORTED_LOCATION)
  message("${name} ${place}")
endforeach()
file(WRITE k.cu "#include <cublasLt.h>\n__global__ void k() {}\n")
add_library(k SHARED k.cu)
target_link_libraries(k CUDA::cublas CUDA::cuda_driver)
"""


def test_a_build_of_vllm_finds_condas_compiler_and_the_wheels_libraries(
    made: Checkout, tmp_path: Path
) -> None:
    """cmake's own search for a toolkit, in the folder that stands for CUDA_HOME."""
    code = """
from custom_kernels.compile import toolchain
from workspace.environment import cuda_home
tools = toolchain.find()
print(cuda_home.view(tools.nvcc, "13.0", tools.cxx), tools.cxx, sep="\\n")
"""
    view, cxx = map(Path, python(made, code).splitlines())
    home = plain(view.parent) / view.name
    bin_ = plain(made.root) / ".conda" / "bin"
    assert (home / "bin" / "nvcc").readlink() == bin_ / "nvcc"
    assert not (home / "bin" / "python").exists()
    (tmp_path / "CMakeLists.txt").write_text(CMAKE)
    path = {"PATH": f"{bin_}:/usr/bin:/bin"}
    options = {
        "CMAKE_CXX_COMPILER": cxx, "CMAKE_CUDA_COMPILER": home / "bin" / "nvcc",
        "CMAKE_CUDA_HOST_COMPILER": cxx, "CMAKE_CUDA_ARCHITECTURES": "90a",
        "CUDAToolkit_ROOT": home,
    }  # fmt: skip
    command = [bin_ / "cmake", "-S", tmp_path, "-B", tmp_path / "b", "-G", "Ninja"]
    command += [f"-D{name}={value}" for name, value in options.items()]
    result = subprocess.run(command, env=path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"version {load().release().cuda.conda['cuda-nvcc']}" in result.stderr
    for name in ("cudart", "cublas"):
        assert f"\n{name} {home}/lib" in result.stderr, result.stderr
    build = subprocess.run(
        [bin_ / "cmake", "--build", tmp_path / "b"], env=path, capture_output=True, check=False
    )
    assert build.returncode == 0, build.stdout.decode()


def test_cut_off_half_way_the_next_run_makes_it_whole(small_checkout: Checkout, tool: Path) -> None:
    checkout = with_conda(small_checkout, tool)
    result = checkout.make("kernels", STOP_HALF_WAY="1")
    assert result.returncode != 0
    assert "critical libmamba the network went away" in result.stdout
    assert (
        result.stdout.count("error: micromamba could not create .conda (its output is above)") == 1
    )
    assert "Traceback" not in result.stdout
    assert (checkout.root / ".conda" / "bin" / "python").exists()
    assert not (checkout.root / ".conda" / "bin" / "nvcc").exists()
    result = checkout.make("kernels")
    assert result.returncode == 0, result.stdout
    assert (checkout.root / ".conda" / "bin" / "nvcc").exists()


def test_an_environment_that_an_image_brought_is_taken_as_it_is(
    made: Checkout, small_checkout: Checkout, tool: Path
) -> None:
    """The packages of conda are there, and nothing of ours yet."""
    prefix = small_checkout.root / ".conda"
    shutil.copytree(made.root / ".conda", prefix, symlinks=True)
    for path in prefix.glob("workspace*.json"):
        path.unlink()
    result = with_conda(small_checkout, tool).make("kernels")
    assert result.returncode == 0, result.stdout
    assert "creating" not in result.stdout


def test_changed_pins_make_it_anew(made: Checkout) -> None:
    pins = made.root / "pins.toml"
    text = pins.read_text()
    other = re.sub(r'^ccache = ".*"', 'ccache = "4.3"', text, flags=re.MULTILINE)
    try:
        pins.write_text(other)
        result = made.make("dev")
        assert result.returncode == 0, result.stdout
        assert "creating .conda with micromamba" in result.stdout
        (record,) = (made.root / ".conda" / "conda-meta").glob("ccache-*")
        assert record.name == "ccache-4.3-0.json"
        assert "creating" not in made.make("dev").stdout
    finally:
        pins.write_text(text)


def test_a_conda_environment_of_the_users_own_is_never_touched(
    small_checkout: Checkout, tool: Path
) -> None:
    """Editors make a folder of that name, too."""
    own = small_checkout.root / ".conda" / "conda-meta" / "history"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    result = with_conda(small_checkout, tool).make("dev")
    assert "/.conda exists, but this workspace did not make it; move it away" in result.stdout
    assert result.returncode != 0
    assert own.read_text() == "mine"


def test_PYTHON_is_refused_because_conda_brings_its_own(
    small_checkout: Checkout, tool: Path
) -> None:
    result = with_conda(small_checkout, tool).make("dev", PYTHON="python3")
    assert "error: ENV=conda installs its own Python, 3.12." in result.stdout
    assert result.returncode != 0


LOADED = """
for line in open("/proc/self/maps"):
    if "/" in line:
        print(line[line.index("/"):].strip())
"""


def test_torch_takes_its_own_cuda_libraries_and_not_what_lies_in_condas_lib(
    made: Checkout, tmp_path: Path
) -> None:
    """conda's Python has conda's lib in its RPATH, which counts for all that it loads; torch and
    the wheels' libraries name their own places, which count more."""
    packages = Path(sysconfig.get_path("purelib")).resolve()  # as /proc names what is loaded
    library = tmp_path / "lib"
    shutil.copytree(made.root / ".conda" / "bin", tmp_path / "bin", symlinks=True)
    others = shutil.ignore_patterns("site-packages")
    shutil.copytree(made.root / ".conda" / "lib", library, symlinks=True, ignore=others)
    names = {path.name for path in (packages / "nvidia").glob("*/lib/lib*.so.*")}
    empty = {library / name for name in names}
    nothing = ["g++", "-shared", "-x", "c++", os.devnull, "-Wl,--no-as-needed"]
    for path in empty:
        path.unlink(missing_ok=True)
        subprocess.run([*nothing, f"-Wl,-soname,{path.name}", "-o", path], check=True)
    plain = tmp_path / "plain.so"
    subprocess.run([*nothing, f"-L{library}", "-l:libcublas.so.13", "-o", plain], check=True)

    def loaded(code: str) -> set[Path]:
        result = subprocess.run(
            [tmp_path / "bin" / "python", "-c", code + LOADED],
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return {Path(line) for line in result.stdout.splitlines()}

    # What names no place of its own gets conda's.
    assert loaded(f"import ctypes; ctypes.CDLL({str(plain)!r})") & empty == {
        library / "libcublas.so.13"
    }
    # After torch it gets torch's, as our kernels do.
    found = loaded(
        f"import ctypes, site; site.addsitedir({str(packages)!r}); import torch; "
        f"ctypes.CDLL({str(plain)!r})"
    )
    ours = {path.name for path in found if path.is_relative_to(packages / "nvidia")}
    assert {"libcublas.so.13", "libcudart.so.13", "libnvJitLink.so.13"} <= ours
    assert found & empty == set()
