# SPDX-License-Identifier: Apache-2.0
"""`make doctor`: what is ready, what is not, and the remedy.

Each check examines the thing itself (an installed distribution, a header, the answer of a driver)
and compares it with pins.toml. Nothing is changed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

from packaging.utils import canonicalize_name
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workspace.environment import conda
from workspace.environment.imports import Imports, probe
from workspace.environment.inventory import headers, libnuma
from workspace.environment.lock import locked
from workspace.fork import built_from, patch_queue
from workspace.fork.tree_state import require, shown
from workspace.host.errors import WorkspaceError
from workspace.host.git import git
from workspace.host.paths import ROOT, lock_files
from workspace.host.settings import device
from workspace.host.text import last_line, some
from workspace.pins.model import Release, load
from workspace.pins.release import active, bundled, selected, tree

Status = Literal["ok", "note", "problem"]
# Not the disassembler: it reads what older releases compiled, and packages ask for a newer one.
CUDA_COMPONENT = re.compile(r"nvidia-(cuda-(?!nvdisasm)[a-z-]+|nvvm|nvjitlink|nvtx)(-cu\d+)?")
NVIDIA = "lib/python*/site-packages/nvidia/*/lib/*.so*"
COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}
MARKS = {"ok": "✓", "note": "•", "problem": "✗"}


@dataclass(frozen=True)
class Check:
    """A row: `note` is worth knowing, `problem` makes the workspace unusable."""

    name: str
    status: Status
    detail: str
    remedy: str


def ok(detail: str) -> Check:
    return Check("", "ok", detail, "")


def note(detail: str, remedy: str = "") -> Check:
    return Check("", "note", detail, remedy)


def problem(detail: str, remedy: str = "make dev") -> Check:
    return Check("", "problem", detail, remedy)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def python() -> Check:
    version = platform.python_version()
    supported = load().python.supported
    if version.rpartition(".")[0] not in supported:
        return problem(version, f"set PYTHON= to one of {', '.join(supported)}")
    if headers() is None:
        return problem(f"{version}, without Python.h")
    return ok(f"{version}, {Path(sys.prefix).name}")


def packages(mode: str, seen: Imports) -> Check:
    """The packages that an engine would import, compared with the lock."""
    if others := [module for module in seen.shadowed if module.module != "vllm"]:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return problem(f"{others[0]}{more}", others[0].remedy)
    if mode == "system":
        if bundled(selected()).joinpath("manifest.json").exists():
            return bundled_packages()
        return note("the host's packages (ENV=system), not compared with the lock")
    wanted = locked(lock_files(selected(), device()))
    wrong = [
        f"{name} {seen.versions.get(name, 'missing')}"
        for name, entry in sorted(wanted.items())
        if seen.versions.get(name) != entry.version
    ]
    if wrong:
        return problem(
            f"{len(wrong)} of {len(wanted)} differ from the lock: {some(wrong)}",
            f"rm {Path(sys.prefix).name}/workspace.json && make dev",
        )
    return ok(f"all {len(wanted)} at their locked versions")


def install_again() -> str:
    """How to make an environment with the host's packages again."""
    stamp = Path(sys.prefix).resolve() / "workspace.json"
    made = json.loads(stamp.read_text()) if stamp.exists() else {}
    python = f" PYTHON={shlex.quote(made['python'])}" if "python" in made else ""
    return f"rm -f {shlex.quote(str(stamp))} && ENV=system{python} make dev"


def bundled_packages() -> Check:
    """The packages of the bundle, and packages of the host that are not at the pinned versions."""
    manifest = json.loads(bundled(selected()).joinpath("manifest.json").read_text())
    host = {name: _installed(name) for name in manifest["hosts_own"]}
    packed = {package["name"]: package["version"] for package in manifest["packages"]}
    bundle = f"bundle {manifest['identity']}"
    if wrong := [name for name, version in packed.items() if _installed(name) != version]:
        return problem(f"not as in {bundle}: {some(wrong)}", install_again())
    if gone := [name for name, version in host.items() if version is None]:
        return problem(
            f"{len(gone)} of the host's packages were removed since its inventory: {some(gone)}",
            "set PYTHON= to the one with them, or pack a bundle with a new inventory",
        )
    differ = [
        f"{name} {version}"
        for name, version in host.items()
        if version and version.split("+")[0] != manifest["hosts_own"][name]["pinned"]
    ]
    others = f", {len(differ)} not at the pinned versions: {some(differ)}" if differ else ""
    return note(f"{len(packed)} from {bundle}, {len(host)} of the host{others}")


def bundle_has_torch() -> bool:
    """Whether this environment has torch from a bundle, with CUDA libraries of the host."""
    manifest = bundled(selected()) / "manifest.json"
    packed = json.loads(manifest.read_text())["packages"] if manifest.exists() else []
    return any(package["name"] == "torch" for package in packed)


LOADED = (
    "import torch; lines = (line.split(maxsplit=5) for line in open('/proc/self/maps')); "
    "print(*sorted({line[5] for line in lines if len(line) > 5}), sep='')"
)
"""Prints the files that a process with torch has loaded, one a line."""
TORCH_LIBRARY = re.compile(r"lib((?:torch|c10|cu|nccl|nv)\w*)\.so")


def torch_libraries() -> Check:
    """Which files a process loads with the bundle's torch: the bundle's, or the host's."""
    prefix = Path(sys.prefix).resolve()
    own = {path.name for path in prefix.glob(NVIDIA) if not path.is_symlink()}
    for folder in filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)):
        if found := sorted(name for name in own if (Path(folder) / name).exists()):
            text = f"{folder} is on LD_LIBRARY_PATH and precedes the bundle's {some(found)}"
            return problem(text, "unset LD_LIBRARY_PATH")
    command = [sys.executable, "-c", LOADED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return problem(
            f"the bundle's torch cannot be imported: {last_line(done.stderr)}", install_again()
        )
    files = [Path(line) for line in done.stdout.splitlines()]
    found = [(match[1], path) for path in files if (match := TORCH_LIBRARY.match(path.name))]
    names = [name for name, _ in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        return problem(f"loaded twice, from different folders: {some(twice)}", install_again())
    hosts = {name: path.parent for name, path in found if not path.is_relative_to(prefix)}
    if foreign := [name for name in hosts if name.startswith(("torch", "c10"))]:
        return problem(
            f"{foreign[0]} is loaded from {hosts[foreign[0]]}, not from the bundle", install_again()
        )
    sources = {prefix: [name for name in names if name not in hosts]}
    sources |= {
        folder: sorted(name for name in hosts if hosts[name] == folder)
        for folder in sorted(set(hosts.values()))
    }
    return ok("; ".join(f"from {folder}: {', '.join(of)}" for folder, of in sources.items()))


SECOND_LIBRARY = re.compile(
    r"(lib)?(cublas|cudnn|cufft|cufile|curand|cusolver|cusparse|nccl|nvjitlink|npp|nvrtc|nvshmem|"
    r"torch|cupy)|pytorch|cuda-(nvrtc|cupti|nvtx|libraries|runtime|toolkit)"
)
"""conda packages with libraries that pip's torch and cupy have, too."""


def conda_packages() -> Check:
    """The packages of ENV=conda, and no others that could be loaded in place of pip's."""
    prefix = Path(sys.prefix).resolve()  # the path of a verb's Python may contain a link
    installed = conda.installed(prefix)
    wanted = conda.packages(selected())
    wrong = [
        f"{name} {installed.get(name, 'missing')}"
        for name, number in wanted.items()
        if installed.get(name) != number
    ]
    if wrong:
        remedy = f"rm -r {shlex.quote(str(prefix))} && make dev ENV=conda"
        return problem(f"differ from pins.toml: {', '.join(wrong)}", remedy)
    if second := sorted(name for name in installed if SECOND_LIBRARY.match(name)):
        remedy = shlex.join(["conda", "remove", "-p", str(prefix), *second])
        return problem(f"{', '.join(second)}: duplicates of libraries of pip's torch", remedy)
    searched = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))
    if prefix / "lib" in [Path(folder).resolve() for folder in searched]:
        text = f"{prefix.name}/lib is on LD_LIBRARY_PATH and precedes the libraries of packages"
        return problem(text, "unset LD_LIBRARY_PATH")
    return ok(f"all {len(wanted)} packages at their pinned versions")


def cuda_components(release: Release) -> dict[str, str | None]:
    """Every installed distribution whose version number is that of a CUDA release."""
    versions = {name: _installed(name) for name in release.cuda.wheels}
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        if CUDA_COMPONENT.fullmatch(name):
            versions[name] = distribution.version
    return versions


def mixed_components(components: dict[str, str | None], release: str) -> dict[str, str]:
    """The components of another CUDA release, e.g. crt 13.5.37 with 13.0."""
    return {
        name: version
        for name, version in components.items()
        if version and ".".join(version.split(".")[:2]) != release
    }


def cuda_release(release: Release, mode: str) -> Check:
    components = cuda_components(release)
    if mixed := mixed_components(components, release.cuda.release):
        names = ", ".join(f"{name} {version}" for name, version in sorted(mixed.items()))
        text = f"mixed with {release.cuda.release}: {names}"
        if mode == "system":  # the packages of a host are not ours to change
            return note(text)
        return problem(text, "pin one release in pins.toml, then: make lock dev")
    missing = [name for name in release.cuda.wheels if components[name] is None]
    if missing and mode != "system":
        return problem(f"missing: {', '.join(missing)}")
    count = sum(version is not None for version in components.values())
    return ok(f"{release.cuda.release}, all {count} components")


def nvcc(release: Release) -> Check:
    try:
        from custom_kernels.compile import toolchain
    except ImportError:
        return problem("the kernels package is not installed")
    try:
        tools = toolchain.find()
    except toolchain.BuildError as error:
        if isinstance(error, toolchain.NoCompiler) and not release.cuda.packages_hold_nvcc:
            remedy = f"CUDA_HOME=<CUDA {release.cuda.release}>, or ENV=conda"
            return note(f"no kernels in CUDA C++: {error}", remedy)
        return problem(str(error), "make dev, or install what is missing")
    where = f"from {tools.nvcc}" if tools.origin == "system" else "of this environment"
    text = f"{tools.nvcc_version} {where}, {tools.cxx_version}"
    if not tools.nvcc_version.startswith(release.cuda.release + "."):
        return problem(text, f"needs release {release.cuda.release}: make dev, or set CUDA_HOME")
    return ok(text)


def gpu(release: Release) -> Check:
    try:
        import pynvml
    except ImportError:
        return note("unknown: nvidia-ml-py is not installed", "make dev")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if device() == "cuda":
            return problem(
                f"a device exists, but the driver does not answer ({error})",
                "check nvidia-smi, or use DEVICE=cpu",
            )
        return note("none: vLLM runs on the CPU, kernels are compiled only")
    driver = pynvml.nvmlSystemGetDriverVersion()
    number = pynvml.nvmlSystemGetCudaDriverVersion()
    major, minor = number // 1000, number % 1000 // 10
    names = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        arch = "".join(map(str, pynvml.nvmlDeviceGetCudaComputeCapability(handle)))
        memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) / 2**30
        names.append(f"{pynvml.nvmlDeviceGetName(handle)} (sm_{arch}, {memory:.0f} GiB)")
    text = f"{', '.join(names)}; driver {driver}, CUDA {major}.{minor}"
    if major < release.cuda.major:
        return problem(text, f"needs a driver for CUDA {release.cuda.release}")
    return ok(text)


def library(name: str, pinned: str, seen: Imports) -> Check:
    version = seen.versions.get(name)
    if version is None or version.split("+")[0] != pinned:
        return problem(version or "missing", f"pinned is {pinned}: make dev")
    return ok(version)


def cpu_flags() -> set[str]:
    return set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text().split("flags", 1)[-1][:4000]))


def cpu_library(existing: set[str]) -> str:
    """Of the existing vLLM CPU libraries, the one that vLLM loads on this processor.

    A release with a single library (0.13.0) has it compiled for AVX2.
    """
    if platform.machine() != "x86_64" or "_C_AVX2.abi3.so" not in existing:
        return "_C.abi3.so"
    flags = cpu_flags()
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        return "_C.abi3.so" if "avx512_bf16" in flags else "_C_AVX512.abi3.so"
    return "_C_AVX2.abi3.so"


def vllm(seen: Imports) -> Check:
    for module in seen.shadowed:
        if module.module == "vllm":
            return problem(f"not from our fork: {module}", module.remedy)
    version = _installed("vllm")
    if version is None:
        return problem("not installed")
    origin = json.loads(metadata.distribution("vllm").read_text("direct_url.json") or "{}")
    where, folder = origin.get("url") or "a released wheel", tree()
    if Path(url2pathname(urlsplit(where).path)) != folder:
        return problem(f"{version} from {where}, not from our fork")
    manifest, wanted = built_from.read_manifest(), device()
    missing = [name for name in manifest.files if not (folder / name).exists()]
    if manifest.device is None or missing:
        return problem(f"{version}, {len(missing)} binaries missing")
    if manifest.device != wanted:
        return problem(f"{version} with binaries for {manifest.device}, not {wanted}")
    detail = f"{version}, editable from {shown(folder)}, {wanted} binaries"
    if wanted == "cuda":
        return ok(detail)
    name = cpu_library({path.name for path in (folder / "vllm").glob("_C*.so")})
    if not (folder / "vllm" / name).exists():
        return problem(f"this CPU needs {name}")
    if platform.machine() == "x86_64" and "avx2" not in cpu_flags():
        return problem("this CPU lacks AVX2, which all vLLM binaries need", "use another machine")
    if not libnuma():
        return problem(f"{version} needs libnuma.so.1")
    return ok(f"{detail} ({name})")


def fork() -> Check:
    try:
        state = require()
    except WorkspaceError as error:
        return problem(*str(error).split("; ", 1))
    patches = patch_queue.files(state.version)
    local = f"{len(state.own_commits)} local commits, {len(state.uncommitted)} uncommitted"
    if state.patches_digest != patch_queue.digest(patches):
        return note(f"patches changed since they were applied; {local}", "make dev")
    link = "" if active() == state.version else f" (src points at {active()})"
    return ok(f"vLLM {state.version}{link}, {len(patches)} patches applied, {local}")


def binaries() -> Check:
    """Whether the compiled files in the tree were made from its current sources."""
    manifest = built_from.read_manifest()
    if manifest.device is None:
        return problem("none in the tree")
    parts = [] if built_from.ALL in manifest.builds else ["released wheel"]
    for name, build in manifest.builds.items():
        archs = build.architectures.replace(";", ", ")
        parts.append(f"{name} compiled here" + (f" for {archs}" if archs else ""))
    origin = "; ".join(parts)
    if manifest.unfinished:
        return problem("a build was interrupted while it installed", "make fork-build")
    if wrong := built_from.other_packages(manifest):
        text = "; ".join(f"{name} was compiled with {what}" for name, what in wrong.items())
        return problem(text, "make fork-build")
    stale, rust = built_from.stale(tree(), selected(), manifest)
    if stale:
        return note(f"{origin}, without the edits of {some(stale)}", "make fork-build")
    if rust:
        text = f"{origin}; vLLM's Rust parts without the edits of {some(rust)}"
        return note(text, "upstream's build_rust.sh, in the tree")
    return ok(f"{origin}; made from the sources as they are")


def kernels() -> Check:
    try:
        from custom_kernels import registry
        from custom_kernels.compile import build, toolchain
    except (ImportError, OSError) as error:
        return problem(str(error))
    try:
        wanted = load().cuda.architectures
        compiled = registry.compiled()
        stale = [
            str(backend)
            for backend in compiled
            if not build.library_path(backend, tuple(wanted)).is_file()
        ]
    except OSError as error:
        return problem(str(error))
    except toolchain.NoCompiler:
        return note("only those in Triton and CuPy: no nvcc for the others")
    except RuntimeError as error:
        return problem(str(error), "make kernels")
    if stale:
        return note(f"not compiled: {', '.join(stale)}", "make kernels")
    names = []
    for backend in compiled:
        only = backend.architectures(wanted)
        names.append(str(backend) if list(only) == wanted else f"{backend} ({', '.join(only)})")
    return ok(f"{', '.join(names)} for {', '.join(wanted)}")


def tools() -> Check:
    missing = [name for name in ("git", "g++") if shutil.which(name) is None]
    if missing:
        return problem(f"missing: {', '.join(missing)}", "install them")
    return ok(f"{git('--version', tree=ROOT).strip()}, g++")


def checks(mode: str) -> list[Check]:
    """Every row; a check that fails with an exception is a problem, and the others still run."""
    release, seen = load().release(), probe(tree())
    own_torch = mode == "system" and bundle_has_torch()
    steps: dict[str, Callable[[], Check]] = {
        "Python": python,
        "packages": partial(packages, mode, seen),
        **({"conda": conda_packages} if mode == "conda" else {}),
        "tools": tools,
        "CUDA release": partial(cuda_release, release, mode),
        "nvcc": partial(nvcc, release),
        "GPU": partial(gpu, release),
        "torch": partial(library, "torch", release.torch, seen),
        **({"CUDA libraries": torch_libraries} if own_torch else {}),
        "triton": partial(library, "triton", release.triton, seen),
        "cupy": partial(library, release.cupy_package, release.cupy, seen),
        "vLLM": lambda: vllm(seen),
        "fork": fork,
        "binaries": binaries,
        "kernels": kernels,
    }
    rows = []
    for name, step in steps.items():
        try:
            check = step()
        except Exception as error:
            check = problem(f"{type(error).__name__}: {error}")
        rows.append(replace(check, name=name))
    return rows


def run(mode: str, *, as_json: bool) -> int:
    """Print the table (or JSON); 0 if the workspace is usable, else 1."""
    rows = checks(mode)
    usable = all(row.status != "problem" for row in rows)
    if as_json:
        print(json.dumps({"usable": usable, "checks": [asdict(row) for row in rows]}, indent=2))
        return 0 if usable else 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "what", "state", "remedy"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(
            f"[{COLOURS[row.status]}]{MARKS[row.status]}[/]",
            row.name,
            escape(row.detail),
            row.remedy,
        )
    console = Console()
    console.print(table)
    console.print("\nready" if usable else "\n[red]not usable yet[/]: see the remedies")
    return 0 if usable else 1
