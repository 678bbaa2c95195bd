# SPDX-License-Identifier: Apache-2.0
"""A conda channel in a folder, for tests where conda-forge is out of reach.

RECIPES holds the packages that pins.toml names and those that come with them, tied together as
conda-forge's recipes say, with other versions beside to choose wrongly from. Read in November 2026
from the feedstocks of cuda-nvcc, cuda-nvcc-impl, cuda-cudart, ctng-compiler-activation,
ctng-compilers, ccache, make and git, not all at the pinned version; C libraries of the small tools
are left out. The real solver and installer work on it.

What is in the packages is made from what this machine has, under the versions of the records: the
interpreter that the tests run on, linked with conda's search path; the nvcc of NVIDIA's wheels, in
the folders of conda's recipe; the system's C++ compiler behind the names of conda's.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rattler

from workspace.pins.model import load

SUBDIR = "linux-64"
TARGET = "targets/x86_64-linux"


@dataclass(frozen=True)
class Recipe:
    """One package of the channel: its record, and what fills its folder."""

    name: str
    version: str
    depends: list[str] = field(default_factory=list)
    constrains: list[str] = field(default_factory=list)
    fill: Callable[[Path], None] = lambda folder: None

    @property
    def index(self) -> dict[str, object]:
        return {
            "name": self.name,
            "version": self.version,
            "build": "0",
            "build_number": 0,
            "subdir": SUBDIR,
            "arch": "x86_64",
            "platform": "linux",
            "depends": self.depends,
            "constrains": self.constrains,
        }


def cuda(release: str, nvcc: str, cudart: str, cccl: str) -> list[Recipe]:
    """The compiler of one CUDA release, and its own parts, as their recipes tie them together."""
    major, minor = map(int, release.split("."))
    tied = [f"cuda-version >={release},<{major}.{minor + 1}.0a0"]
    host = ["gcc_impl_linux-64 >=6,<15.0a0"]
    return [
        Recipe("cuda-version", release),
        Recipe("cuda-nvcc", nvcc, [f"cuda-nvcc_linux-64 {nvcc}.*", "gcc_linux-64", "gxx_linux-64"]),
        Recipe(
            "cuda-nvcc_linux-64",
            nvcc,
            [
                f"cuda-nvcc-dev_linux-64 {nvcc}.*",
                f"cuda-cudart-dev_linux-64 {release}.*",
                f"cuda-driver-dev_linux-64 {release}.*",
                f"cuda-nvcc-tools {nvcc}.*",
                f"cuda-nvcc-impl {nvcc}.*",
                "sysroot_linux-64 >=2.17,<3.0a0",
            ],
        ),
        Recipe(
            "cuda-nvcc-impl",
            nvcc,
            [
                f"cuda-nvcc-tools {nvcc} 0",
                f"cuda-nvcc-dev_linux-64 {nvcc} 0",
                f"cuda-nvvm-impl {nvcc} 0",
                "cuda-cudart-dev",
                *tied,
            ],
            host,
        ),
        Recipe(
            "cuda-nvcc-tools",
            nvcc,
            [f"cuda-crt-tools {nvcc} 0", f"cuda-nvvm-tools {nvcc} 0", *tied],
            host,
            fill=nvcc_tools,
        ),
        Recipe(
            "cuda-nvcc-dev_linux-64",
            nvcc,
            [
                f"cuda-crt-dev_linux-64 {nvcc} 0",
                f"cuda-nvvm-dev_linux-64 {nvcc} 0",
                "libgcc >=6",
                *tied,
            ],
            host,
            fill=nvcc_target,
        ),
        *(
            Recipe(name, nvcc, tied)
            for name in ("cuda-crt-tools", "cuda-crt-dev_linux-64", "cuda-nvvm-tools")
        ),
        *(Recipe(name, nvcc, tied) for name in ("cuda-nvvm-dev_linux-64", "cuda-nvvm-impl")),
        Recipe("cuda-cudart", cudart, [f"cuda-cudart_linux-64 {cudart} 0", *tied], fill=cudart_lib),
        Recipe(
            "cuda-cudart-dev",
            cudart,
            [
                f"cuda-cudart {cudart} 0",
                f"cuda-cudart-dev_linux-64 {cudart} 0",
                f"cuda-cudart-static {cudart} 0",
                *tied,
            ],
        ),
        Recipe(
            "cuda-cudart-dev_linux-64",
            cudart,
            [
                "cuda-cccl_linux-64",
                "cuda-cudart-static_linux-64",
                "cuda-cudart_linux-64",
                *tied,
            ],
            fill=cudart_headers,
        ),
        *(
            Recipe(name, cudart, tied)
            for name in (
                "cuda-cudart_linux-64",
                "cuda-cudart-static",
                "cuda-cudart-static_linux-64",
                "cuda-driver-dev_linux-64",
            )
        ),
        Recipe("cuda-driver-dev", cudart, [f"cuda-driver-dev_linux-64 {cudart} 0", *tied]),
        Recipe("cuda-cccl", cccl, [f"cuda-cccl_linux-64 {cccl} 0", *tied]),
        Recipe("cuda-cccl_linux-64", cccl, tied, fill=cccl_headers),
        Recipe("cuda-cuobjdump", cccl, tied),
        Recipe("cuda-nvdisasm", cccl, tied),
    ]


def gcc(version: str) -> list[Recipe]:
    same = f"{version}.*"
    return [
        Recipe("gcc_impl_linux-64", version, [f"libgcc >={version}", "sysroot_linux-64"]),
        Recipe("gxx_impl_linux-64", version, [f"gcc_impl_linux-64 {version} 0"], fill=cxx("x86")),
        Recipe("gcc_linux-64", version, [f"gcc_impl_linux-64 {same}", "sysroot_linux-64"]),
        Recipe("gxx_linux-64", version, [f"gcc_linux-64 {version} 0", f"gxx_impl_linux-64 {same}"]),
        Recipe("gcc", version, [f"gcc_impl_linux-64 {same}", f"conda-gcc-specs {same}"]),
        Recipe("conda-gcc-specs", version, [f"gcc_impl_linux-64 {same}"]),
        Recipe("gxx", version, [f"gcc {same}", f"gxx_impl_linux-64 {same}"], fill=cxx("plain")),
    ]


def small(name: str, *versions: str) -> list[Recipe]:
    return [Recipe(name, version) for version in versions]


# --- what is in them ------------------------------------------------------------------------------


def _wheel() -> Path:
    return Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"


def _link_if_large(path: str, target: str) -> None:
    """Packing 160 MB of compilers and unpacking them again would take longer than using them."""
    if Path(path).name != "nvcc" and Path(path).stat().st_size > 1 << 20:  # nvcc looks where it is
        Path(target).symlink_to(path)
    else:
        shutil.copy(path, target)


def nvcc_tools(folder: Path) -> None:
    """nvcc and its parts in bin and nvvm, with the profile that conda's recipe makes of NVIDIA's:
    headers and libraries are in the target's folder. Parts are links to the wheel's."""
    for name in ("bin", "nvvm"):
        shutil.copytree(_wheel() / name, folder / name, copy_function=_link_if_large)
    profile = (_wheel() / "bin" / "nvcc.profile").read_text()
    top = [line for line in profile.splitlines() if line.startswith("TOP ")]
    assert len(top) == 1
    profile = profile.replace("$(TOP)/$(_TARGET_DIR_)", "$(TOP)")
    profile = profile.replace(top[0], "TOP = $(_HERE_)/../$(_TARGET_DIR_)")
    (folder / "bin" / "nvcc.profile").write_text(profile)


def nvcc_target(folder: Path) -> None:
    place = folder / TARGET
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "nvcc").symlink_to("../../../bin/nvcc")
    (place / "nvvm").symlink_to("../../nvvm")
    (place / "lib").mkdir()
    (place / "lib64").symlink_to("lib")


def _headers(folder: Path, *, of_cccl: bool) -> None:
    for path in sorted((_wheel() / "include").iterdir()):
        if (path.name == "cccl") == of_cccl:
            copy = shutil.copytree if path.is_dir() else shutil.copy
            target = folder / TARGET / "include" / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            copy(path, target)


def cudart_headers(folder: Path) -> None:
    _headers(folder, of_cccl=False)


def cccl_headers(folder: Path) -> None:
    _headers(folder, of_cccl=True)


def cudart_lib(folder: Path) -> None:
    (folder / TARGET / "lib").mkdir(parents=True)
    shutil.copy(_wheel() / "lib" / "libcudart.so.13", folder / TARGET / "lib")
    (folder / "lib").mkdir()
    (folder / "lib" / "libcudart.so.13").symlink_to(f"../{TARGET}/lib/libcudart.so.13")


def cxx(kind: str) -> Callable[[Path], None]:
    """The system's compilers under conda's names."""
    prefix = "x86_64-conda-linux-gnu-" if kind == "x86" else ""

    def fill(folder: Path) -> None:
        (folder / "bin").mkdir()
        for name in ("gcc", "g++"):
            real = shutil.which(name)
            assert real
            script = folder / "bin" / f"{prefix}{name}"
            script.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
            script.chmod(0o755)

    return fill


def python(folder: Path) -> None:
    """The interpreter that the tests' environment was made with, in the folders of conda's, and
    linked as conda's is: RPATH (not RUNPATH) $ORIGIN/../lib."""
    base, name = Path(sys.base_prefix), f"python3.{sys.version_info.minor}"
    library = Path(sysconfig.get_config_var("LIBDIR")) / sysconfig.get_config_var("LDLIBRARY")
    skip = shutil.ignore_patterns(
        *("test", "tests", "__pycache__", "site-packages", "config-*", "idlelib", "tkinter"),
        *("ensurepip", "lib2to3", "pydoc_data", "turtledemo"),
    )
    shutil.copytree(base / "lib" / name, folder / "lib" / name, ignore=skip)
    (folder / "lib" / name / "site-packages").mkdir()
    shutil.copytree(base / "include" / name, folder / "include" / name)
    shutil.copy(library.resolve(), folder / "lib")
    large = [*folder.glob("lib/*.so*"), *folder.glob(f"lib/{name}/lib-dynload/*.so")]
    subprocess.run(["strip", "--strip-debug", *large], check=True)
    (folder / "bin").mkdir()
    program = "#include <Python.h>\nint main(int n, char **a) { return Py_BytesMain(n, a); }\n"
    subprocess.run(
        [
            "g++", "-x", "c++", "-", "-x", "none", f"-I{base}/include/{name}", str(library),
            "-Wl,--disable-new-dtags,-rpath,$ORIGIN/../lib", "-o", folder / "bin" / name,
        ],
        input=program, text=True, check=True,
    )  # fmt: skip
    for alias in ("python", "python3"):
        (folder / "bin" / alias).symlink_to(name)


def can_make_python() -> bool:
    """Whether there is a shared library of this interpreter to link with (Debian's folders have
    names of their own, which conda's environments do not)."""
    library = str(sysconfig.get_config_var("LDLIBRARY"))
    folder = Path(str(sysconfig.get_config_var("LIBDIR")))
    own = Path(sys.base_prefix) / "lib" / f"python3.{sys.version_info.minor}" / "os.py"
    return (folder / library).is_file() and own.exists() and sys.base_prefix != "/usr"


# --- the channel ----------------------------------------------------------------------------------


def pinned(name: str, *others: str, **more: Any) -> list[Recipe]:
    """A package at its pinned version, and at others."""
    return [Recipe(name, version, **more) for version in (load().conda[name], *others)]


CUDA = {"cuda-version": "release", "cuda-nvcc": "nvcc", "cuda-cudart-dev": "cudart"}
CUDA["cuda-cccl"] = "cccl"
RECIPES = [
    *(
        recipe
        for release in load().vllm.release.values()
        for recipe in cuda(**{CUDA[k]: v for k, v in release.cuda.conda.items() if k in CUDA})
    ),
    *cuda("13.2", "13.2.86", "13.2.75", "13.2.75"),
    *gcc(load().conda["gxx"]),
    *gcc("15.2.0"),
    *small("libgcc", "15.2.0"),
    *small("sysroot_linux-64", "2.17", "2.34"),
    Recipe("python", load().conda["python"], fill=python),
    Recipe("python", "3.13.9"),
    *pinned("pip", "99", depends=["python >=3.10,<3.14.0a0"]),
    *pinned("ccache", "4.3"),
    *pinned("make", "4.3"),
    *pinned("git", "2.49.0"),
]


def solve(specs: list[str], channel: str) -> dict[str, str]:
    """What conda's solver chooses: package → version. Raises rattler's SolverError."""
    solved = rattler.solve(sources=[channel], specs=specs, platforms=[SUBDIR, "noarch"])
    return {one.name.normalized: str(one.version) for one in asyncio.run(solved)}


def describe(folder: Path) -> str:
    """A channel of records only, to solve with; returns its address."""
    return _channel(folder, {f"{one.name}-{one.version}-0.tar.bz2": one.index for one in RECIPES})


def pack(folder: Path, chosen: set[tuple[str, str]]) -> str:
    """A channel with these packages for real; returns its address."""
    (folder / SUBDIR).mkdir(parents=True)
    entries = {}
    for one in RECIPES:
        if (one.name, one.version) in chosen:
            archive = _pack(one, folder / SUBDIR)
            sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
            entries[archive.name] = one.index | {"sha256": sha256, "size": archive.stat().st_size}
    return _channel(folder, entries)


def _channel(folder: Path, packages: dict[str, dict[str, object]]) -> str:
    none: dict[str, dict[str, object]] = {}
    for subdir, entries in ((SUBDIR, packages), ("noarch", none)):
        (folder / subdir).mkdir(parents=True, exist_ok=True)
        repodata = {"info": {"subdir": subdir}, "packages": entries, "packages.conda": none}
        (folder / subdir / "repodata.json").write_text(json.dumps(repodata))
    return folder.as_uri()


def _pack(recipe: Recipe, folder: Path) -> Path:
    with tempfile.TemporaryDirectory() as work:
        place = Path(work)
        recipe.fill(place)
        paths = [_entry(place, Path(path)) for path in sorted(_files(place))]
        (place / "info").mkdir()
        for name, content in (
            ("index.json", recipe.index),
            ("paths.json", {"paths_version": 1, "paths": paths}),
        ):
            (place / "info" / name).write_text(json.dumps(content))
        archive = folder / f"{recipe.name}-{recipe.version}-0.tar.bz2"
        with tarfile.open(archive, "w:bz2", compresslevel=1) as tar:
            for path in sorted(place.iterdir()):
                tar.add(path, path.name)
        return archive


def _files(place: Path) -> Iterator[str]:
    for top, folders, names in os.walk(place):
        links = [name for name in folders if Path(top, name).is_symlink()]
        yield from (os.path.relpath(Path(top, name), place) for name in [*names, *links])


def _entry(place: Path, path: Path) -> dict[str, object]:
    link = (place / path).is_symlink()
    content = b"" if link else (place / path).read_bytes()
    return {
        "_path": str(path),
        "path_type": "softlink" if link else "hardlink",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_in_bytes": len(content),
    }


# --- the command ----------------------------------------------------------------------------------


COMMAND = '''\
#!{python}
"""Stands in for micromamba, for the one way in which it is called: conda's library underneath."""
import argparse, asyncio, os, sys
from pathlib import Path
import rattler

parser = argparse.ArgumentParser()
parser.add_argument("verb", choices=["create"])
parser.add_argument("-y", action="store_true", required=True)
parser.add_argument("-p", dest="prefix", type=Path, required=True)
parser.add_argument("--override-channels", action="store_true", required=True)
parser.add_argument("-c", dest="channel", choices=["conda-forge"], required=True)
parser.add_argument("specs", nargs="+", type=lambda text: rattler.MatchSpec(text, strict=True))
given = parser.parse_args()
if given.prefix.exists():
    sys.exit(f"{{given.prefix}} exists")


async def create():
    records = await rattler.solve(sources=["{channel}"], specs=given.specs)
    if os.environ.get("STOP_HALF_WAY"):
        records = [one for one in records if one.name.normalized == "python"]
    await rattler.install(
        records, target_prefix=given.prefix, cache_dir="{cache}", show_progress=False
    )
    if os.environ.get("STOP_HALF_WAY"):
        print("critical libmamba the network went away", file=sys.stderr, flush=True)
        os._exit(1)


asyncio.run(create())
# With many files to install, py-rattler 0.28 crashes in one of four runs while Python ends.
os._exit(0)
'''


def command(folder: Path, channel: str) -> Path:
    """A folder for PATH with a `micromamba` that knows this channel as conda-forge."""
    folder.mkdir()
    text = COMMAND.format(python=sys.executable, channel=channel, cache=folder / "packages")
    (folder / "micromamba").write_text(text)
    (folder / "micromamba").chmod(0o755)
    return folder
