# SPDX-License-Identifier: Apache-2.0
"""A CUDA_HOME of the usual layout, for build systems that need one.

The CUDA packages of the environment are in one folder, or one per component, and their libraries
have versioned names only. cmake's FindCUDAToolkit and torch's cmake files look for `bin`,
`include`, `lib64` with plain `lib*.so` names, `nvvm`, and the driver's library to link with. The
view has links to them. Only the driver's library, which pip's packages lack, is compiled: a stub
like that of NVIDIA's toolkit, which exports the functions that cuda.h declares and is never loaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from workspace.host.errors import WorkspaceError
from workspace.host.files import new_folder
from workspace.host.paths import MACHINE
from workspace.host.text import last_line

DRIVER = Path("lib64", "stubs", "libcuda.so")
PARTS = {"include": Path("include"), "lib": Path("lib64"), "nvvm": Path("nvvm")}
"""Folder in a package → folder in the view."""
TOOLS = (
    *("nvcc", "nvcc.profile", "ptxas", "fatbinary", "cudafe++", "nvlink", "bin2c", "cuobjdump"),
    *("nvdisasm", "__nvcc_device_query", "crt/*"),
)
"""The files of the tool chain beside nvcc; conda's bin has many others."""


def view(nvcc: Path, release: str, cxx: Path) -> Path:
    """CUDA_HOME for a build with the `nvcc` of this environment's packages; made again when the
    files of the packages changed."""
    home = MACHINE / f"cuda-{release}"
    links = _links(nvcc)
    current = {
        path.relative_to(home): path.readlink()
        for path in home.rglob("*")
        if path.is_symlink() and path.name != "lib"
    }
    if (home / DRIVER).exists() and current == links:
        return home
    shutil.rmtree(home, ignore_errors=True)
    with new_folder(home) as folder:
        for name, path in links.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(path)
        if DRIVER not in links:
            _driver_library(folder / "include", folder / DRIVER, cxx)
        (folder / "lib").symlink_to("lib64")
    return home


def _packages(nvcc: Path) -> list[Path]:
    """The folder of the compiler, then those of the libraries."""
    home = nvcc.parents[1]
    targets = sorted(home.glob("targets/*-linux"))
    if not targets:
        return [home, *sorted(path for path in home.parent.iterdir() if path != home)]
    # conda: headers and libraries are under targets/; cuBLAS and the like come from pip.
    return [*targets, *sorted((Path(sysconfig.get_path("purelib")) / "nvidia").iterdir())]


def _links(nvcc: Path) -> dict[Path, Path]:
    """Path in the view → file of a package; of two files with the same name the first one."""
    # nvcc looks for its profile where it is called, and from there for all else.
    tools = [path for name in TOOLS for path in sorted(nvcc.parent.glob(name))]
    links = {Path("bin") / path.relative_to(nvcc.parent): path for path in tools}
    for package in _packages(nvcc):
        for part, folder in PARTS.items():
            for path in sorted((package / part).rglob("*")):
                if path.is_dir() or path.suffix in (".py", ".pyc"):
                    continue
                name = folder / path.relative_to(package / part)
                links.setdefault(name, path)
                links.setdefault(name.with_name(re.sub(r"\.so\.[\d.]+$", ".so", path.name)), path)
    return links


def _driver_library(include: Path, library: Path, cxx: Path) -> None:
    """Compile a stub of libcuda.so, which only a machine with a GPU has, to link with."""
    header = subprocess.run(
        [cxx, "-E", "-P", "-x", "c++", "-include", "cuda.h", f"-I{include}", os.devnull],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = sorted(set(re.findall(r"\bCUresult\s+(cu[A-Z]\w+)\s*\(", header.stdout)))
    if not names:
        reason = last_line(header.stderr or "it declares no function")
        raise WorkspaceError(f"cannot read {include}/cuda.h: {reason}; run: make dev")
    library.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [cxx, "-x", "c++", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, "-"],
        input="".join(f'extern "C" int {name}() {{ return 34; }}\n' for name in names).encode(),
        check=True,
    )
