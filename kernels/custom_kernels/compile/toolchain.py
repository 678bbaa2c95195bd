# SPDX-License-Identifier: Apache-2.0
"""nvcc, the host compiler, tvm-ffi, CUDA's headers and libraries: which ones, and from where."""

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

_HEADER_PACKAGES = {
    "cutlass": (
        ("flashinfer", "data/cutlass/include", "flashinfer-python"),
        ("cutlass_library", "source/include", "nvidia-cutlass"),
    )
}
"""Where the headers that a source may ask for lie: (module, folder in it, package), in the order of
search."""


class BuildError(RuntimeError):
    """A kernel cannot be compiled. The message says why, with the compiler's own words where it has
    any."""


class NoCompiler(BuildError):
    """There is no nvcc, or none that goes with the environment's CUDA runtime."""


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
    """``packages`` or ``conda`` for an environment's own nvcc, ``system`` for one from CUDA_HOME or
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
            f"{nvcc} is of CUDA {nvcc_version}, this environment of {runtime}: "
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
        include=tuple(folder / "include" for folder in folders if (folder / "include").is_dir()),
        library=tuple(
            folder / lib
            for folder in folders
            for lib in ("lib", "lib64")
            if (folder / lib).is_dir()
        ),
        origin=origin,
    )


def include_folders() -> tuple[Path, ...]:
    """Folders of CUDA's headers, also where there is no nvcc; starts no process."""
    try:
        nvcc, _ = _find_nvcc()
    except BuildError:
        nvcc = None
    found = (folder / "include" for folder in _cuda_folders(nvcc))
    return tuple(dict.fromkeys(folder for folder in found if folder.is_dir()))


def _cuda_folders(nvcc: Path | None) -> list[Path]:
    """Where headers and libraries lie: in the packages, then beside nvcc."""
    home = [nvcc.parent.parent] if nvcc else []
    targets = [path for folder in home for path in folder.glob("targets/*-linux")]
    return [*_cuda_packages(), *targets, *home]


def _find_nvcc() -> tuple[Path, str]:
    """The environment's own nvcc (conda's, then the packages'), else the system's."""
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
            f"the packages of CUDA {runtime} hold none; set CUDA_HOME to a toolkit of that release "
            "or use ENV=conda"
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
    """Folders of CUDA's packages, in whichever of this interpreter's folders they are: nvidia/cu13
    and the one of cuSPARSELt; up to CUDA 12 one folder per component."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(name) for name in (spec.submodule_search_locations or [])] if spec else []
    if any((folder / "cu13").is_dir() for folder in folders):
        # In more than one of them where some come beside a host's own.
        found = [folder / part for folder in folders for part in ("cu13", "cusparselt")]
        return [path for path in found if path.is_dir()]
    parts = [part for folder in folders for part in sorted(folder.iterdir())]
    return [part for part in parts if (part / "include").is_dir() or (part / "lib").is_dir()]


def packaged_runtime() -> str | None:
    """The release of the CUDA runtime among the packages, for example ``12.8``; None where there is
    none."""
    for package in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return ".".join(importlib.metadata.version(package).split(".")[:2])
    return None


def headers(name: str) -> tuple[Path, str]:
    if name not in _HEADER_PACKAGES:
        raise BuildError(
            f"`// include: {name}`: there is no such package of headers; there are "
            f"{', '.join(_HEADER_PACKAGES)}"
        )
    for module, inside, package in _HEADER_PACKAGES[name]:
        spec = importlib.util.find_spec(module)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / inside).is_dir():
                return Path(folder) / inside, f"{package} {importlib.metadata.version(package)}"
    if root := paths.checkout():
        brought = root / ".workspace" / "headers" / name  # by a bundle, out of such a package
        if (brought / "include").is_dir():
            return brought / "include", (brought / "package").read_text().strip()
    packages = " or ".join(package for _, _, package in _HEADER_PACKAGES[name])
    raise BuildError(
        f"the headers of {name} are not installed for {sys.executable}: run `make dev`, or install "
        f"the package {packages}, which holds them"
    )


def _version(command: list[str], pattern: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(pattern, result.stdout)
    if result.returncode != 0 or match is None:
        raise BuildError(
            f"`{' '.join(command)}` failed: {(result.stderr or result.stdout).strip()}"
        )
    return match.group(1)


def library(tools: Toolchain, name: str) -> Path:
    """The file of a shared library that a source asks for, or of apache-tvm-ffi."""
    folders = (tools.tvm_ffi / "lib", *tools.library)
    for folder in folders:
        for candidate in [*sorted(folder.glob(f"lib{name}.so.*")), folder / f"lib{name}.so"]:
            if candidate.is_file():
                return candidate
    searched = ", ".join(map(str, folders))
    raise BuildError(f"the library {name!r} is in none of {searched}: run `make dev`")
