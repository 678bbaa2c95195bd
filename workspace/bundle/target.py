# SPDX-License-Identifier: Apache-2.0
"""The host that a bundle is for, as its inventory describes it, and whether vLLM can run there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from packaging import tags
from packaging.version import Version
from pydantic import BaseModel, Field, ValidationError

from workspace.environment.inventory import FORMAT
from workspace.host.errors import WorkspaceError
from workspace.pins.model import Device, Pins, Release

OLDEST_DRIVER = {12: 525, 13: 580}
"""Version of CUDA → the oldest driver that runs it, whatever the minor version.

Source: NVIDIA, CUDA Compatibility, section Minor Version Compatibility."""

HOW = (
    "on the host: python3 inventory.py > inventory.json (that file is "
    "workspace/environment/inventory.py; with a checkout: make inventory), then copy it here"
)


class Python(BaseModel):
    executable: str
    version: str
    short: str
    implementation: str
    free_threaded: bool
    headers: bool
    missing_modules: list[str]
    lzma: bool


class Libc(BaseModel):
    name: str
    version: str


class Torch(BaseModel):
    version: str
    cuda: str | None
    sees_gpu: bool = False


class Gpu(BaseModel):
    name: str
    driver: str
    capability: str


class Nvcc(BaseModel):
    path: str
    version: str


class Package(BaseModel):
    version: str
    requires: list[str]
    links_torch: bool = False
    """Whether it is compiled against the torch that it was installed with."""


class Host(BaseModel):
    """An inventory; other fields are for people to read."""

    format: int
    machine: str
    system: str
    libc: Libc
    libnuma: bool
    python: Python
    markers: dict[str, str]
    gpus: list[Gpu]
    torch: Torch | None
    nvcc: Nvcc | None
    tools: dict[str, str | None]
    packages: dict[str, Package] = Field(repr=False)

    @property
    def device(self) -> Device:
        return "cuda" if self.gpus else "cpu"

    def has_nvcc(self, release: Release) -> bool:
        """Whether its CUDA compiler is of the release's CUDA version."""
        return self.nvcc is not None and self.nvcc.version.startswith(release.cuda.release + ".")


def read(path: Path) -> Host:
    """An inventory file.

    Raises:
        WorkspaceError: the file does not exist, or is not an inventory.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise WorkspaceError(f"TARGET={path}: {error.strerror}; {HOW}") from None
    except ValueError as error:
        raise WorkspaceError(f"TARGET={path} is not JSON ({error}); {HOW}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise WorkspaceError(f"TARGET={path} is not an inventory of this version; {HOW}")
    try:
        return Host.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WorkspaceError(
            f"TARGET={path} is not a complete inventory: {where}: {first['msg']}; {HOW}"
        ) from None


def platforms(host: Host) -> Iterator[str]:
    """The platforms whose wheels run there, best first: its glibc's and those of older ones."""
    major, minor = (int(part) for part in host.libc.version.split(".")[:2])
    older = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    for number in range(minor, 4, -1):
        yield f"manylinux_{major}_{number}_{host.machine}"
        if number in older:
            yield f"{older[number]}_{host.machine}"
    yield f"linux_{host.machine}"


def supported_tags(host: Host) -> list[tags.Tag]:
    """The tags of wheels that its Python can install, best first."""
    numbers = tuple(int(part) for part in host.python.short.split("."))
    interpreter = f"cp{numbers[0]}{numbers[1]}"
    abi = interpreter + ("t" if host.python.free_threaded else "")
    names = list(platforms(host))
    return [
        *tags.cpython_tags(numbers, abis=[abi], platforms=names),
        *tags.compatible_tags(numbers, interpreter, names),
    ]


def problems(host: Host, version: str, pins: Pins) -> Iterator[str]:
    """Why this release of vLLM cannot run there, worst first; none if it can."""
    release, python = pins.release(version), host.python
    wheels = release.binaries.get(host.device, {})
    if host.machine not in wheels:
        known = ", ".join(sorted(wheels)) or "none"
        yield (
            f"it is {host.machine}, and pins.toml has vLLM {version} for {host.device} on {known} "
            "only; use another machine, or pin a wheel for it"
        )
    if host.libc.name != "glibc":
        yield f"its C library is {host.libc.name or 'unknown'}, vLLM's binaries need glibc"
    if python.implementation != "cpython" or python.free_threaded:
        kind = "free-threaded" if python.free_threaded else python.implementation
        yield f"{python.executable} is {kind}; vLLM needs an ordinary CPython"
    if python.short not in pins.python.supported:
        supported = ", ".join(sorted(pins.python.supported))
        yield (
            f"{python.executable} is Python {python.short}, supported are {supported}; make the "
            "inventory with one of those, which has torch"
        )
    if python.missing_modules:
        names = ", ".join(python.missing_modules)
        yield (
            f"{python.executable} lacks Python's own {names}; install them there (Debian, Ubuntu: "
            f"python{python.short}-venv)"
        )
    yield from _driver_problems(host, version, pins)
    if not python.headers:
        yield (
            f"it has no Python.h for {python.executable}, and vLLM compiles at run time; install "
            f"it there (Debian, Ubuntu: python{python.short}-dev)"
        )
    if host.device == "cpu" and not host.libnuma:
        yield "it has no libnuma.so.1; install it there (Debian, Ubuntu: libnuma1)"
    missing = [name for name in ("git", "make", "g++") if not host.tools.get(name)]
    if missing:
        yield f"it lacks {', '.join(missing)}; install them there"


def _driver_problems(host: Host, version: str, pins: Pins) -> Iterator[str]:
    wanted = pins.release(version).cuda.major
    if not host.gpus or (host.torch and host.torch.sees_gpu and _cuda(host.torch) == wanted):
        return  # with NVIDIA's compatibility package an older driver serves, too
    found = host.gpus[0].driver
    number = int(found.split(".")[0])
    if number < OLDEST_DRIVER.get(wanted, 0):
        others = [
            name
            for name, release in pins.vllm.release.items()
            if OLDEST_DRIVER[release.cuda.major] <= number
        ]
        bundle = f", or bundle another release: VLLM_VERSION={others[0]}" if others else ""
        yield (
            f"its driver is {found}, vLLM {version} is built for CUDA {wanted}, which needs "
            f"{OLDEST_DRIVER[wanted]} or later; install one{bundle}"
        )


def _cuda(torch: Torch) -> int | None:
    return int(torch.cuda.split(".")[0]) if torch.cuda else None


def unfit_torch(host: Host, release: Release) -> str | None:
    """Why vLLM cannot run with the torch that the host has; None if it can."""
    if host.torch is None:
        return f"{host.python.executable} has no torch that can be imported"
    found = Version(host.torch.version)
    if found.public != release.torch:
        return f"the host has torch {found}"
    triton = host.packages.get("triton")
    if host.device == "cuda" and _cuda(host.torch) != release.cuda.major:
        built = f"CUDA {host.torch.cuda}" if host.torch.cuda else "the CPU only"
        return f"the host's torch {found} is built for {built}"
    if host.device == "cuda" and triton and Version(triton.version).public != release.triton:
        return f"the host has triton {triton.version}"
    return None


def require_workable(host: Host, version: str, pins: Pins) -> None:
    """Raise with the worst reason why vLLM cannot run on the host."""
    found = list(problems(host, version, pins))
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise WorkspaceError(f"no bundle for that host: {found[0]}{more}")
