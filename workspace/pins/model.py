# SPDX-License-Identifier: Apache-2.0
"""pins.toml as a checked model: every version and every hash, read from one place."""

from __future__ import annotations

import platform
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from workspace.host.errors import WorkspaceError
from workspace.host.paths import PINS
from workspace.pins.release import selected

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Device = Literal["cuda", "cpu"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Python(_Model):
    supported: list[str]


class Artifact(_Model):
    """One file of a package index: the project it belongs to, its name and its sha256."""

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
        """NVIDIA's packages do since CUDA 13; those of CUDA 12 have headers and libraries only."""
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
    """By device and machine; where a wheel serves one Python only, by Python, too."""
    cuda: Cuda
    packages: dict[str, str] = Field(default_factory=dict)
    """What this release needs instead of, or beside, the packages of all releases."""

    @property
    def cupy_package(self) -> str:
        return f"cupy-cuda{self.cuda.major}x"

    def binary(
        self, device: Device, machine: str | None = None, python: str | None = None
    ) -> Artifact:
        """The wheel whose compiled parts run on `device`, with this Python on this machine, or with
        those given."""
        machine, python = machine or platform.machine(), python or python_version()
        wheels = self.binaries.get(device, {})
        found = wheels.get(machine)
        if found is None:
            known = ", ".join(sorted(wheels)) or "none"
            raise WorkspaceError(
                f"no pinned vLLM binaries for {device} on {machine} (there are: {known}); "
                "add the wheel to pins.toml"
            )
        if isinstance(found, Artifact):
            return found
        if python not in found:
            raise WorkspaceError(
                f"no vLLM binaries for {device} on {machine} with Python {python}; give PYTHON= "
                f"one of {', '.join(sorted(found))}"
            )
        return found[python]


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
    """Packages of every environment that conda makes, beside a release's CUDA tool chain."""
    cuda: Architectures
    vllm: Vllm
    packages: Packages

    def release(self, version: str | None = None) -> Release:
        """The pins of a release; without `version`, of the selected one."""
        version = version or selected()
        try:
            return self.vllm.release[version]
        except KeyError:
            known = ", ".join(self.vllm.release)
            raise WorkspaceError(f"vLLM {version} is not pinned; pins.toml has {known}") from None


def read(path: Path) -> Pins:
    """Read and check a pins file; raises WorkspaceError naming the first wrong entry."""
    try:
        return Pins.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        raise WorkspaceError(f"{path} is missing; run: git checkout pins.toml") from None
    except tomllib.TOMLDecodeError as error:
        raise WorkspaceError(f"{path} is not valid TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WorkspaceError(f"{path}: {where}: {first['msg']}") from None


@cache
def load() -> Pins:
    """The workspace's own pins."""
    return read(PINS)
