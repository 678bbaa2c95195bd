# SPDX-License-Identifier: Apache-2.0
"""Which environment a verb uses: what makes it, for which device, Python and vLLM release.

Bootstrap reads the make variables and hands them on under names of the workspace's own: vLLM warns
of a VLLM_VERSION, and a shell would run the file that ENV names.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from workspace.host.options import choice, declared, read, text

Device = Literal["cuda", "cpu"]
HANDED_ON = {
    "ENV": "WORKSPACE_ENV",
    "DEVICE": "WORKSPACE_DEVICE",
    "PYTHON": "WORKSPACE_PYTHON",
    "VLLM_VERSION": "WORKSPACE_RELEASE",
}
"""Make variable → the workspace's own, which reaches every process that a verb starts."""


@dataclass(frozen=True)
class Settings:
    """What the user chose; None leaves it to the machine or to what is set up already."""

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
        """What makes the environment."""
        return self.env or "uv"


def current() -> Settings:
    """What was chosen: by make variables in bootstrap, by the workspace's own after it.

    Raises:
        WorkspaceError: a value that is not known.
    """
    return read(
        Settings,
        {name: os.environ.get(name) or os.environ.get(own, "") for name, own in HANDED_ON.items()},
    )


def hand_on(chosen: Settings) -> None:
    """Let this process and those that it starts see the choice; the make variables end here."""
    for name, option in declared(Settings):
        value, own = getattr(chosen, name), HANDED_ON[option.variable]
        for variable in (option.variable, own):
            os.environ.pop(variable, None)
        if value is not None:
            os.environ[own] = value
