# SPDX-License-Identifier: Apache-2.0
"""`make doctor`: what is ready, what is not, and the remedy.

Each check looks at the thing itself (an installed distribution, a header, a driver's answer)
and compares it with pins.toml. Nothing is changed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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
from workspace.environment.device import device
from workspace.environment.imports import Imports, look
from workspace.environment.inventory import headers, libnuma
from workspace.environment.lock import locked
from workspace.fork import built_from, install, patch_queue
from workspace.fork.tree_state import state
from workspace.host import git
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT, lock_files
from workspace.host.text import some
from workspace.pins.model import Release, load
from workspace.pins.release import active, bundled, selected, tree

Status = Literal["ok", "note", "problem"]
CUDA_COMPONENT = re.compile(r"nvidia-(cuda-[a-z-]+|nvvm|nvjitlink|nvtx)(-cu\d+)?")
REBUILD = "make fork-build"
COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}
MARKS = {"ok": "✓", "note": "•", "problem": "✗"}


@dataclass(frozen=True)
class Check:
    """One row: what was looked at, how it is, and what to do about it.

    `note` is worth knowing, `problem` makes the workspace unusable.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def python() -> Check:
    version = platform.python_version()
    supported = load().python.supported
    if ".".join(version.split(".")[:2]) not in supported:
        return Check("Python", "problem", version, f"give PYTHON= one of {', '.join(supported)}")
    if headers() is None:
        return Check("Python", "problem", f"{version}, without Python.h", "make dev")
    return Check("Python", "ok", f"{version}, {Path(sys.prefix).name}")


def packages(mode: str, seen: Imports) -> Check:
    """What an engine would import, and whether its versions are the locked ones."""
    if others := [one for one in seen.hidden if one.module != "vllm"]:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return Check("packages", "problem", f"{others[0]}{more}", others[0].remedy)
    if mode == "system":
        text = "the host's own (ENV=system), not compared with the lock"
        return bundled_packages() or Check("packages", "note", text)
    wanted = locked(lock_files(selected(), device()))
    there = seen.versions
    wrong = [name for name, entry in wanted.items() if there.get(name) != entry.version]
    if wrong:
        names = ", ".join(f"{name} {there.get(name, 'missing')}" for name in sorted(wrong)[:4])
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        return Check(
            "packages", "problem",
            f"{len(wrong)} of {len(wanted)} differ from the lock: {names}{more}",
            f"rm {Path(sys.prefix).name}/workspace.json && make dev",
        )  # fmt: skip
    return Check("packages", "ok", f"all {len(wanted)} at their locked versions")


def bundled_packages() -> Check | None:
    """What a bundle brought, and which of the host's own packages are not at the pins' versions;
    None where there is no bundle."""
    path = bundled(selected()) / "manifest.json"
    if not path.exists():
        return None
    manifest = json.loads(path.read_text())
    own = {name: _installed(name) for name in manifest["hosts_own"]}
    brought = {one["name"]: one["version"] for one in manifest["packages"]}
    origin = f"bundle {manifest['identity']}"
    wrong = [name for name, version in brought.items() if _installed(name) != version]
    if wrong:
        stamp = shlex.quote(str(Path(sys.prefix).resolve() / "workspace.json"))
        remedy = f"rm {stamp} && ENV=system make dev"
        return Check("packages", "problem", f"not as {origin} brought: {some(wrong)}", remedy)
    gone = [name for name, version in own.items() if version is None]
    if gone:
        return Check(
            "packages", "problem",
            f"{len(gone)} that the host had when its inventory was made are gone: {some(gone)}",
            "give the PYTHON= that has them, or pack a bundle with a new inventory",
        )  # fmt: skip
    differ = [
        f"{name} {version}"
        for name, version in own.items()
        if version and version.split("+")[0] != manifest["hosts_own"][name]["pinned"]
    ]
    others = f", {len(differ)} not at the pins' versions: {some(differ)}" if differ else ""
    return Check(
        "packages", "note", f"{len(brought)} from {origin}, {len(own)} of the host's own{others}"
    )


SECOND_LIBRARY = re.compile(
    r"(lib)?(cublas|cudnn|cufft|cufile|curand|cusolver|cusparse|nccl|nvjitlink|npp|nvrtc|nvshmem|"
    r"torch|cupy)|pytorch|cuda-(nvrtc|cupti|nvtx|libraries|runtime|toolkit)"
)
"""conda's packages of what pip's torch and cupy bring, too."""


def conda_packages() -> Check:
    """What ENV=conda brought, and nothing beside it that could be loaded in place of pip's."""
    prefix = Path(sys.prefix).resolve()  # a verb's Python may run by a link with a plain name
    found = conda.installed(prefix)
    wanted = conda.packages(load().model_dump(), selected())
    wrong = [
        f"{name} {found.get(name, 'missing')}"
        for name, number in wanted.items()
        if found.get(name) != number
    ]
    second = sorted(name for name in found if SECOND_LIBRARY.match(name))
    if wrong:
        remedy = f"rm -r {shlex.quote(str(prefix))} && make dev ENV=conda"
        return Check("conda", "problem", f"differ from pins.toml: {', '.join(wrong)}", remedy)
    if second:
        text = f"{', '.join(second)} beside the same library of pip's torch"
        return Check(
            "conda", "problem", text, shlex.join(["conda", "remove", "-p", str(prefix), *second])
        )
    searched = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))
    if prefix / "lib" in [Path(folder).resolve() for folder in searched]:
        text = f"{prefix.name}/lib is on LD_LIBRARY_PATH and goes before what packages bring"
        return Check("conda", "problem", text, "unset LD_LIBRARY_PATH")
    return Check("conda", "ok", f"all {len(wanted)} packages at their pinned versions")


def cuda_components(release: Release) -> dict[str, str | None]:
    """Every installed distribution that carries a CUDA release as its version number."""
    found = {name: _installed(name) for name in release.cuda.wheels}
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        if CUDA_COMPONENT.fullmatch(name):
            found[name] = distribution.version
    return found


def mixed_components(components: dict[str, str | None], release: str) -> dict[str, str]:
    """The components that are not of the one release, e.g. crt 13.5.37 beside 13.0."""
    return {
        name: version
        for name, version in components.items()
        if version and ".".join(version.split(".")[:2]) != release
    }


def tool_chain(release: Release, mode: str) -> Iterator[Check]:
    components = cuda_components(release)
    mixed = mixed_components(components, release.cuda.release)
    missing = [name for name in release.cuda.wheels if components[name] is None]
    if mixed:
        text = ", ".join(f"{name} {version}" for name, version in sorted(mixed.items()))
        # The packages of a host are its own affair, and not ours to change.
        status: Status = "note" if mode == "system" else "problem"
        remedy = "" if mode == "system" else "pin one release in pins.toml, then: make lock dev"
        yield Check("CUDA release", status, f"mixed with {release.cuda.release}: {text}", remedy)
    elif missing and mode != "system":
        yield Check("CUDA release", "problem", f"missing: {', '.join(missing)}", "make dev")
    else:
        count = sum(version is not None for version in components.values())
        yield Check("CUDA release", "ok", f"{release.cuda.release}, all {count} components")
    try:
        from custom_kernels.compile import toolchain

        tools = toolchain.find()
    except ImportError:
        yield Check("nvcc", "problem", "the kernels package is not installed", "make dev")
        return
    except toolchain.BuildError as error:
        if isinstance(error, toolchain.NoCompiler) and not release.cuda.packages_hold_nvcc:
            remedy = f"CUDA_HOME=<CUDA {release.cuda.release}>, or ENV=conda"
            yield Check("nvcc", "note", f"kernels in CUDA C++ are left out: {error}", remedy)
        else:
            yield Check("nvcc", "problem", str(error), "make dev, or install what is named")
        return
    right = tools.nvcc_version.startswith(release.cuda.release + ".")
    where = f"from {tools.nvcc}" if tools.origin == "system" else "of this environment"
    yield Check(
        "nvcc",
        "ok" if right else "problem",
        f"{tools.nvcc_version} {where}, {tools.cxx_version}",
        "" if right else f"needs release {release.cuda.release}: make dev, or set CUDA_HOME",
    )


def gpu(release: Release) -> Check:
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return Check("GPU", "note", "nvidia-ml-py is not installed, cannot look", "make dev")
    except pynvml.NVMLError as error:
        if device() == "cuda":
            return Check(
                "GPU", "problem", f"a device is there, but the driver does not answer ({error})",
                "check nvidia-smi, or work without: DEVICE=cpu",
            )  # fmt: skip
        return Check("GPU", "note", "none: vLLM runs on the CPU, kernels are compiled only")
    driver = pynvml.nvmlSystemGetDriverVersion()
    number = pynvml.nvmlSystemGetCudaDriverVersion()
    supports = (number // 1000, number % 1000 // 10)
    names = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30
        names.append(f"{pynvml.nvmlDeviceGetName(handle)} (sm_{major}{minor}, {memory:.0f} GiB)")
    text = f"{', '.join(names)}; driver {driver}, CUDA {supports[0]}.{supports[1]}"
    wanted = tuple(map(int, release.cuda.release.split(".")))
    if supports[0] < wanted[0]:
        return Check("GPU", "problem", text, f"needs a driver for CUDA {release.cuda.release}")
    return Check("GPU", "ok", text)


def libraries(release: Release, seen: Imports) -> Iterator[Check]:
    """torch, triton and cupy at the pinned versions."""
    for name, wanted in (
        ("torch", release.torch), ("triton", release.triton), (release.cupy_package, release.cupy)
    ):  # fmt: skip
        found = seen.versions.get(name)
        good = found is not None and found.split("+")[0] == wanted
        yield Check(
            name.split("-")[0],
            "ok" if good else "problem",
            found or "missing",
            "" if good else f"pinned is {wanted}: make dev",
        )


def cpu_flags() -> set[str]:
    return set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text().split("flags", 1)[-1][:4000]))


def cpu_library(there: set[str]) -> str:
    """Of the vLLM CPU libraries that are `there`, the one for this processor, by vLLM's own rule.

    A release with one library for all (0.13.0) has it compiled for AVX2.
    """
    if platform.machine() != "x86_64" or "_C_AVX2.abi3.so" not in there:
        return "_C.abi3.so"
    flags = cpu_flags()
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        return "_C.abi3.so" if "avx512_bf16" in flags else "_C_AVX512.abi3.so"
    return "_C_AVX2.abi3.so"


def vllm(seen: Imports) -> Check:
    for one in seen.hidden:
        if one.module == "vllm":
            return Check("vLLM", "problem", f"not from our fork: {one}", one.remedy)
    version = _installed("vllm")
    if version is None:
        return Check("vLLM", "problem", "not installed", "make dev")
    origin = json.loads(metadata.distribution("vllm").read_text("direct_url.json") or "{}")
    where, place = origin.get("url") or "a released wheel", tree()
    if Path(url2pathname(urlsplit(where).path)) != place:
        return Check("vLLM", "problem", f"{version} from {where}, not from our fork", "make dev")
    manifest = install.read_manifest()
    missing = [name for name in manifest.get("files", {}) if not (place / name).exists()]
    if not manifest or missing:
        return Check("vLLM", "problem", f"{version}, {len(missing)} binaries missing", "make dev")
    wanted = device()
    if manifest["device"] != wanted:
        return Check(
            "vLLM", "problem", f"{version} with binaries for {manifest['device']}, not {wanted}",
            "make dev",
        )  # fmt: skip
    library = cpu_library({path.name for path in (place / "vllm").glob("_C*.so")})
    if wanted == "cpu" and not (place / "vllm" / library).exists():
        return Check("vLLM", "problem", f"this CPU needs {library}", "make dev")
    if wanted == "cpu" and platform.machine() == "x86_64" and "avx2" not in cpu_flags():
        return Check(
            "vLLM", "problem", "this CPU lacks AVX2, without which no vLLM binaries run on it",
            "take another machine",
        )  # fmt: skip
    if wanted == "cpu" and not libnuma():
        return Check("vLLM", "problem", f"{version} needs libnuma.so.1", "make dev")
    detail = f"{version}, editable from {place.relative_to(ROOT)}, {manifest['device']} binaries"
    return Check("vLLM", "ok", detail + (f" ({library})" if wanted == "cpu" else ""))


def fork_state() -> Check:
    try:
        found = state()
    except WorkspaceError as error:
        return Check("fork", "problem", str(error), "move it away, then: make dev")
    if found is None:
        return Check("fork", "problem", f"{tree().relative_to(ROOT)} is not there", "make dev")
    patches = patch_queue.files(found.version)
    own = f"{len(found.own_commits)} local commits, {len(found.uncommitted)} uncommitted"
    if found.patches_digest != patch_queue.digest(patches):
        return Check("fork", "note", f"patches changed since they were applied; {own}", "make dev")
    shown = "" if active() == found.version else f" (src shows {active()})"
    return Check(
        "fork", "ok", f"vLLM {found.version}{shown}, {len(patches)} patches applied, {own}"
    )


def binaries() -> Check:
    """Whether the compiled files in the tree are made from the sources beside them."""
    manifest = install.read_manifest()
    if not manifest:
        return Check("binaries", "problem", "none in the tree", "make dev")
    builds = manifest.get("builds", {})
    parts = [] if built_from.ALL in builds else ["released wheel"]
    for name, build in builds.items():
        archs = build["architectures"].replace(";", ", ")
        parts.append(f"{name} compiled here" + (f" for {archs}" if archs else ""))
    origin = "; ".join(parts)
    if manifest.get("unfinished"):
        return Check("binaries", "problem", "a build was cut off while it installed", REBUILD)
    if wrong := built_from.other_packages(manifest):
        text = "; ".join(f"{name} was compiled with {what}" for name, what in wrong.items())
        return Check("binaries", "problem", text, REBUILD)
    stale, rust = built_from.stale(tree(), selected(), manifest)
    if stale:
        text = f"{origin}, without the edits of {some(stale)}"
        return Check("binaries", "note", text, REBUILD)
    if rust:
        text = f"{origin}; vLLM's Rust parts without the edits of {some(rust)}"
        return Check("binaries", "note", text, "upstream's build_rust.sh, in the tree")
    return Check("binaries", "ok", f"{origin}; made from the sources as they are")


def kernels() -> Check:
    try:
        from custom_kernels import registry
        from custom_kernels.compile import build, toolchain

        wanted = load().cuda.architectures
        stale = [
            str(backend)
            for backend in registry.compiled()
            if not build.library_path(backend, tuple(wanted)).is_file()
        ]
    except (ImportError, OSError) as error:
        return Check("kernels", "problem", str(error), "make dev")
    except toolchain.NoCompiler:
        return Check("kernels", "note", "those in Triton and CuPy: there is no nvcc for the others")
    except RuntimeError as error:
        return Check("kernels", "problem", str(error), "make kernels")
    if stale:
        return Check("kernels", "note", f"not compiled: {', '.join(stale)}", "make kernels")
    names = []
    for backend in registry.compiled():
        only = backend.architectures(wanted)
        names.append(str(backend) if list(only) == wanted else f"{backend} ({', '.join(only)})")
    return Check("kernels", "ok", f"{', '.join(names)} for {', '.join(wanted)}")


def tools() -> Check:
    missing = [name for name in ("git", "g++") if shutil.which(name) is None]
    if missing:
        return Check("tools", "problem", f"missing: {', '.join(missing)}", "install them")
    return Check("tools", "ok", f"{git.version().strip()}, g++")


def checks(mode: str) -> list[Check]:
    """Every check; one that breaks is itself a problem, not the end of the others."""
    release, seen = load().release(), look(tree())
    steps: dict[str, Callable[[], Check | Iterator[Check]]] = {
        "Python": python,
        "packages": lambda: packages(mode, seen),
        **({"conda": conda_packages} if mode == "conda" else {}),
        "tools": tools,
        "CUDA": lambda: tool_chain(release, mode),
        "GPU": lambda: gpu(release),
        "libraries": lambda: libraries(release, seen),
        "vLLM": lambda: vllm(seen),
        "fork": fork_state,
        "binaries": binaries,
        "kernels": kernels,
    }
    rows: list[Check] = []
    for name, step in steps.items():
        try:
            result = step()
            rows += [result] if isinstance(result, Check) else list(result)
        except Exception as error:
            rows.append(Check(name, "problem", f"{type(error).__name__}: {error}", "make dev"))
    return rows


def run(mode: str, *, as_json: bool) -> int:
    """Print the table (or JSON); 0 where the workspace is usable, else 1."""
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
