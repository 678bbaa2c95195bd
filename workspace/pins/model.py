# SPDX-License-Identifier: Apache-2.0
"""pins.toml as a checked model: every version and every hash, read only here."""

from __future__ import annotations

import platform
import sys
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from workspace.host.errors import WorkspaceError
from workspace.host.paths import PINS
from workspace.host.settings import Device
from workspace.pins.release import parse, selected

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Python(_Model):
    supported: list[str]


class Artifact(_Model):
    """A file of a package index."""

    project: str
    filename: str
    sha256: Sha256


class Uv(_Model):
    version: str
    sha256: dict[str, Sha256]


class Container(_Model):
    base: str
    micromamba: str
    devcontainers_cli: str = Field(alias="devcontainers-cli")


class Architectures(_Model):
    architectures: list[Annotated[str, StringConstraints(pattern=r"^\d+\.\d[af]?$")]]


class Cuda(_Model):
    """One CUDA release: the components that carry its number, and the libraries in it."""

    release: str
    toolkit: str
    wheels: dict[str, str]
    libraries: dict[str, str]
    conda: dict[str, str]

    @property
    def major(self) -> int:
        return int(self.release.split(".")[0])

    @property
    def packages_hold_nvcc(self) -> bool:
        """True from CUDA 13; NVIDIA's packages of CUDA 12 have headers and libraries only."""
        return self.major >= 13


def python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


class Release(_Model):
    """One supported vLLM release with everything that has to match it."""

    tree: str
    torch: str
    triton: str
    cupy: str
    sdist: Artifact
    binaries: dict[Device, dict[str, Artifact | dict[str, Artifact]]]
    """By device and machine; if a wheel is for one Python version, also by Python version."""
    cuda: Cuda
    packages: dict[str, str] = Field(default_factory=dict)
    """Packages of this release, instead of or in addition to those of all releases."""

    @property
    def cupy_package(self) -> str:
        return f"cupy-cuda{self.cuda.major}x"

    def binary(
        self, device: Device, machine: str | None = None, python: str | None = None
    ) -> Artifact:
        """The wheel with the compiled parts for `device`; machine and Python default to these.

        Raises:
            WorkspaceError: none is pinned.
        """
        machine, python = machine or platform.machine(), python or python_version()
        wheels = self.binaries.get(device, {})
        wheel = wheels.get(machine)
        if wheel is None:
            raise WorkspaceError(
                f"no pinned vLLM binaries for {device} on {machine} (pinned: "
                f"{', '.join(sorted(wheels)) or 'none'}); add the wheel to pins.toml"
            )
        if isinstance(wheel, Artifact):
            return wheel
        if python not in wheel:
            raise WorkspaceError(
                f"no vLLM binaries for {device} on {machine} with Python {python}; set PYTHON= to "
                f"one of {', '.join(sorted(wheel))}"
            )
        return wheel[python]


class Vllm(_Model):
    default: str
    release: dict[str, Release]


class Packages(_Model):
    gpu: list[str]
    direct: dict[str, str]


class Pins(_Model):
    python: Python
    uv: Uv
    container: Container
    conda: dict[str, str]
    """Packages of every conda environment, in addition to the CUDA tool chain of the release."""
    cuda: Architectures
    vllm: Vllm
    packages: Packages

    def release(self, version: str | None = None) -> Release:
        """The pins of a release; without `version`, of the selected one."""
        version = version or selected()
        if version not in self.vllm.release:
            known = ", ".join(self.vllm.release)
            raise WorkspaceError(f"vLLM {version} is not pinned; pins.toml has {known}")
        return self.vllm.release[version]

    def built_for(self, torch: str) -> str | None:
        """The release whose binaries are built for a version of torch, None without one."""
        same = (name for name, release in self.vllm.release.items() if release.torch == torch)
        return next(same, None)


def read(path: Path) -> Pins:
    """Read and check a pins file; raises WorkspaceError naming the first wrong entry."""
    try:
        return Pins.model_validate(parse(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WorkspaceError(f"{path} is not valid: {where}: {first['msg']}") from None


@cache
def load() -> Pins:
    """The pins of this checkout."""
    return read(PINS)
