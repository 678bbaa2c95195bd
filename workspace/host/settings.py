# SPDX-License-Identifier: Apache-2.0
"""Which environment a verb uses: ENV, DEVICE, PYTHON and VLLM_VERSION.

Bootstrap reads these make variables and passes them on as WORKSPACE_ variables: vLLM warns of a
VLLM_VERSION, and a shell would run the file that ENV names.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.host.options import choice, declared, read, text

Device = Literal["cuda", "cpu"]
EXPORTED = {
    "ENV": "WORKSPACE_ENV",
    "DEVICE": "WORKSPACE_DEVICE",
    "PYTHON": "WORKSPACE_PYTHON",
    "VLLM_VERSION": "WORKSPACE_RELEASE",
}
"""Make variable → the variable that every process of a verb inherits."""


@dataclass(frozen=True)
class Settings:
    """What the user chose; None: by the machine or by what is set up already."""

    env: str | None = choice(
        "ENV",
        "what makes the environment: `uv`; `conda` (Python, compilers and nvcc from conda-forge "
        "with micromamba, mamba or conda); `system` (installs nothing and uses the packages of "
        "`PYTHON`: for containers and GPU hosts with their own torch)",
        "uv", "conda", "system",
        default="`uv`; in an image `conda`",
    )  # fmt: skip
    device: Device | None = choice(  # noqa: RUF009 - a field
        "DEVICE",
        "which binaries vLLM gets",
        "cuda", "cpu",
        default="`cuda` where there is an NVIDIA GPU",
    )  # fmt: skip
    python: str | None = text(
        "PYTHON",
        "an interpreter, 3.11 to 3.13",
        default="3.12 if installed, else 3.11, 3.13; later the one of the environment",
    )
    version: str | None = text(
        "VLLM_VERSION",
        "a release of pins.toml; `make dev` points `vllm-fork/src` at it, other verbs only use it",
        example="0.13.0",
        default="the one that `vllm-fork/src` points at",
    )

    @property
    def mode(self) -> str:
        """What makes the environment: uv, conda or system."""
        return self.env or "uv"


def current() -> Settings:
    """The settings of this process: from make variables in bootstrap, then from WORKSPACE_ ones.

    Raises:
        WorkspaceError: a value is not valid.
    """
    get = os.environ.get
    return read(Settings, {name: get(name) or get(ours, "") for name, ours in EXPORTED.items()})


def export(chosen: Settings) -> None:
    """Pass the settings on to this process and its children; remove the make variables."""
    for name, option in declared(Settings):
        value, exported = getattr(chosen, name), EXPORTED[option.variable]
        for variable in (option.variable, exported):
            os.environ.pop(variable, None)
        if value is not None:
            os.environ[exported] = value


def device() -> Device:
    """DEVICE= if given, else cuda where the NVIDIA driver (or WSL's) made a GPU device."""
    if chosen := current().device:
        return chosen
    # Device files, because calling nvidia-smi can take seconds.
    gpu = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    return "cuda" if gpu else "cpu"
