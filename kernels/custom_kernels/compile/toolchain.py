# SPDX-License-Identifier: Apache-2.0
"""Find nvcc, the host compiler, tvm-ffi, and CUDA's headers and libraries."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from custom_kernels import paths

HEADER_PACKAGES = {
    "cutlass": (
        ("flashinfer", "data/cutlass/include", "flashinfer-python"),
        ("cutlass_library", "source/include", "nvidia-cutlass"),
    )
}
"""Name in ``// include:`` → (module, folder in it, package), in the order of search."""


class BuildError(RuntimeError):
    """A kernel cannot be compiled. The message says why, with the compiler's errors if it ran."""


class NoCompiler(BuildError):
    """There is no nvcc, or only one of another CUDA release than the environment's runtime."""


@dataclass(frozen=True)
class Toolchain:
    """The compilers and where they come from."""

    nvcc: Path
    nvcc_version: str
    cxx: Path
    cxx_version: str
    tvm_ffi: Path
    tvm_ffi_version: str
    include: tuple[Path, ...]
    library: tuple[Path, ...]
    origin: str
    """``packages`` or ``conda`` for the environment's nvcc, ``system`` for one from CUDA_HOME or
    PATH."""

    def versions(self) -> dict[str, str]:
        return {"nvcc": self.nvcc_version, "c++": self.cxx_version, "tvm-ffi": self.tvm_ffi_version}


@functools.cache
def find() -> Toolchain:
    """Find nvcc, the host compiler and tvm-ffi. Raises BuildError with the remedy if one is
    missing, NoCompiler if that is nvcc."""
    nvcc, origin = _find_nvcc()
    nvcc_version = _version([str(nvcc), "--version"], r"V(\d+\.\d+\.\d+)")
    runtime = packaged_runtime()
    if runtime and runtime.split(".")[0] != nvcc_version.split(".")[0]:
        raise NoCompiler(
            f"{nvcc} is of CUDA {nvcc_version}, this environment's runtime of {runtime}: "
            + _nvcc_remedy(runtime)
        )
    cxx = _find_cxx()
    tvm_ffi = importlib.util.find_spec("tvm_ffi")
    if tvm_ffi is None or not tvm_ffi.submodule_search_locations:
        raise BuildError(
            f"apache-tvm-ffi is not installed for {sys.executable}, and kernels cannot be compiled "
            "without its headers: run `make dev`, or install the package apache-tvm-ffi"
        )
    folders = _cuda_folders(nvcc)
    return Toolchain(
        nvcc=nvcc,
        nvcc_version=nvcc_version,
        cxx=cxx,
        cxx_version=_version([str(cxx), "--version"], r"(.+)"),
        tvm_ffi=Path(tvm_ffi.submodule_search_locations[0]),
        tvm_ffi_version=importlib.metadata.version("apache-tvm-ffi"),
        include=_existing(folders, "include"),
        library=_existing(folders, "lib", "lib64"),
        origin=origin,
    )


def include_folders() -> tuple[Path, ...]:
    """Folders of CUDA's headers, also where there is no nvcc; starts no process."""
    try:
        nvcc, _ = _find_nvcc()
    except BuildError:
        nvcc = None
    return tuple(dict.fromkeys(_existing(_cuda_folders(nvcc), "include")))


def _existing(folders: list[Path], *names: str) -> tuple[Path, ...]:
    paths = (folder / name for folder in folders for name in names)
    return tuple(path for path in paths if path.is_dir())


def _cuda_folders(nvcc: Path | None) -> list[Path]:
    """Folders with headers and libraries: the packages, then those beside nvcc."""
    if nvcc is None:
        return _cuda_packages()
    home = nvcc.parent.parent
    return [*_cuda_packages(), *home.glob("targets/*-linux"), home]


def _find_nvcc() -> tuple[Path, str]:
    """The environment's nvcc (conda's, then the packages'), else the system's."""
    prefix = Path(sys.prefix)
    if (prefix / "conda-meta").is_dir() and (prefix / "bin" / "nvcc").is_file():
        return prefix / "bin" / "nvcc", "conda"
    for folder in _cuda_packages():
        if (folder / "bin" / "nvcc").is_file():
            return folder / "bin" / "nvcc", "packages"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        nvcc = Path(os.environ.get(variable) or "/nonexistent") / "bin" / "nvcc"
        if nvcc.is_file():
            return nvcc, "system"
    if found := shutil.which("nvcc"):
        return Path(found).resolve(), "system"
    raise NoCompiler(
        "there is no nvcc in this environment, under CUDA_HOME or on PATH: "
        + _nvcc_remedy(packaged_runtime())
    )


def _nvcc_remedy(runtime: str | None) -> str:
    if runtime and int(runtime.split(".")[0]) < 13:
        return (
            f"there is no package of it for CUDA {runtime}; set CUDA_HOME to a toolkit of that "
            "release, or use ENV=conda"
        )
    return "run `make dev`, which installs the pinned one, or install the package nvidia-cuda-nvcc"


def _find_cxx() -> Path:
    prefix = Path(sys.prefix)
    names = [os.environ.get("CXX"), "x86_64-conda-linux-gnu-g++", "g++", "c++"]
    for name in filter(None, names):
        if (prefix / "conda-meta").is_dir() and (prefix / "bin" / name).is_file():
            return prefix / "bin" / name
        if found := shutil.which(name):
            return Path(found)
    raise BuildError(
        "there is no C++ compiler: install g++ (Debian, Ubuntu: `apt-get install g++`) or set CXX"
    )


def _cuda_packages() -> list[Path]:
    """Folders of the installed CUDA packages: nvidia/cu13 and nvidia/cusparselt; up to CUDA 12 one
    per component."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(name) for name in (spec.submodule_search_locations or [])] if spec else []
    if any((folder / "cu13").is_dir() for folder in folders):
        # Several where packages are installed beside the host's.
        found = [folder / part for folder in folders for part in ("cu13", "cusparselt")]
        return [path for path in found if path.is_dir()]
    parts = [part for folder in folders for part in sorted(folder.iterdir())]
    return [part for part in parts if (part / "include").is_dir() or (part / "lib").is_dir()]


def packaged_runtime() -> str | None:
    """Release of the installed CUDA runtime package, for example ``12.8``; None without one."""
    for package in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return ".".join(importlib.metadata.version(package).split(".")[:2])
    return None


def headers(name: str) -> tuple[Path, str]:
    """The folder of these headers, and their package with its version. Raises BuildError if they
    are not installed."""
    if name not in HEADER_PACKAGES:
        raise BuildError(
            f"`// include: {name}`: unknown headers; known are {', '.join(HEADER_PACKAGES)}"
        )
    for module, inside, package in HEADER_PACKAGES[name]:
        spec = importlib.util.find_spec(module)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / inside).is_dir():
                return Path(folder) / inside, f"{package} {importlib.metadata.version(package)}"
    if root := paths.checkout():
        bundled = root / ".workspace" / "headers" / name  # by `make unbundle`
        if (bundled / "include").is_dir():
            return bundled / "include", (bundled / "package").read_text().strip()
    packages = " or ".join(package for _, _, package in HEADER_PACKAGES[name])
    raise BuildError(
        f"the headers of {name} are not installed for {sys.executable}: run `make dev`, or install "
        f"the package {packages}, which holds them"
    )


def _version(command: list[str], pattern: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(pattern, result.stdout)
    if result.returncode != 0 or match is None:
        raise BuildError(
            f"the tool `{' '.join(command)}` failed: {(result.stderr or result.stdout).strip()}"
        )
    return match.group(1)


def library(tools: Toolchain, name: str) -> Path:
    """The file of a shared library that a ``.cu`` links with."""
    folders = (tools.tvm_ffi / "lib", *tools.library)
    for folder in folders:
        for candidate in [*sorted(folder.glob(f"lib{name}.so.*")), folder / f"lib{name}.so"]:
            if candidate.is_file():
                return candidate
    searched = ", ".join(map(str, folders))
    raise BuildError(f"the library {name!r} is in none of {searched}: run `make dev`")
