# SPDX-License-Identifier: Apache-2.0
"""A CUDA folder of the usual layout, for build systems that look for one.

The tool chain of the environment is packages: one folder, or one per component, with libraries
under their full names only. cmake's FindCUDAToolkit and torch's cmake files look for `bin`,
`include`, `lib64` with plain `lib*.so` names, `nvvm`, and the driver's library to link with. The
view has them, as links; only the driver's library, which pip's packages do not bring, is made: it
exports the functions that cuda.h declares, as the stub in NVIDIA's own toolkit does, and is never
loaded.
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

DRIVER = Path("lib64", "stubs", "libcuda.so")
PARTS = {"include": Path("include"), "lib": Path("lib64"), "nvvm": Path("nvvm")}
"""Folder in a package → folder in the view."""
TOOLS = (
    *("nvcc", "nvcc.profile", "ptxas", "fatbinary", "cudafe++", "nvlink", "bin2c", "cuobjdump"),
    *("nvdisasm", "__nvcc_device_query", "crt/*"),
)
"""What stands beside nvcc; in conda's bin, many others stand there, too."""


def view(nvcc: Path, release: str, cxx: Path) -> Path:
    """CUDA_HOME for a build with the `nvcc` of this environment's packages.

    Made anew when the packages hold other files than it shows.
    """
    place = MACHINE / f"cuda-{release}"
    links = _links(nvcc)
    if (place / DRIVER).exists() and _linked(place) == links:
        return place
    shutil.rmtree(place, ignore_errors=True)
    with new_folder(place) as folder:
        for inside, path in links.items():
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            (folder / inside).symlink_to(path)
        if DRIVER not in links:
            _driver_library(folder / "include", folder / DRIVER, cxx)
        (folder / "lib").symlink_to("lib64")
    return place


def _packages(nvcc: Path) -> list[Path]:
    """The folder of the compiler, then those of the libraries."""
    home = nvcc.parents[1]
    targets = sorted(home.glob("targets/*-linux"))
    if not targets:
        return [home, *sorted(path for path in home.parent.iterdir() if path != home)]
    # conda's: headers and libraries have a folder of their own; cuBLAS and the like are pip's.
    return [*targets, *sorted((Path(sysconfig.get_path("purelib")) / "nvidia").iterdir())]


def _links(nvcc: Path) -> dict[Path, Path]:
    """Place in the view → file of a package; where two have the same name, the first counts."""
    # nvcc looks for its profile where it is called, and from there for all else.
    tools = [path for name in TOOLS for path in sorted(nvcc.parent.glob(name))]
    links = {Path("bin") / path.relative_to(nvcc.parent): path for path in tools}
    for package in _packages(nvcc):
        for part, place in PARTS.items():
            for path in sorted((package / part).rglob("*")):
                if path.is_dir() or path.suffix in (".py", ".pyc"):
                    continue
                inside = place / path.relative_to(package / part)
                plain = re.sub(r"\.so\.[\d.]+$", ".so", path.name)
                links.setdefault(inside, path)
                links.setdefault(inside.with_name(plain), path)
    return links


def _linked(place: Path) -> dict[Path, Path]:
    return {
        path.relative_to(place): Path(os.readlink(path))
        for path in place.rglob("*")
        if path.is_symlink() and path.name != "lib"
    }


def _driver_library(include: Path, library: Path, cxx: Path) -> None:
    """What to link with in place of libcuda.so, which only a machine with a GPU has."""
    header = subprocess.run(
        [cxx, "-E", "-P", "-x", "c++", "-include", "cuda.h", f"-I{include}", os.devnull],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = sorted(set(re.findall(r"\bCUresult\s+(cu[A-Z]\w+)\s*\(", header.stdout)))
    if not names:
        reason = (header.stderr.strip().splitlines() or ["it declares no function"])[-1]
        raise WorkspaceError(f"cannot read {include}/cuda.h: {reason}; run: make dev")
    library.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [cxx, "-x", "c++", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, "-"],
        input="".join(f'extern "C" int {name}() {{ return 34; }}\n' for name in names).encode(),
        check=True,
    )
