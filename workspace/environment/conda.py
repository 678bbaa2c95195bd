# SPDX-License-Identifier: Apache-2.0
"""ENV=conda: an environment whose Python, compilers and nvcc come from conda-forge.

conda, mamba or micromamba installs the packages that pins.toml lists for it, by exact version; the
Python packages come from the lock, through uv, as in every other environment. environment.yml
describes the same environment for those who create it without this workspace.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from workspace.host.errors import WorkspaceError
from workspace.pins import release

TOOLS = ("micromamba", "mamba", "conda")
CHANNEL = "conda-forge"


def packages(version: str) -> dict[str, str]:
    """The conda packages of a release's environment with their versions."""
    pins = release.pins()
    return {**pins["conda"], **pins["vllm"]["release"][version]["cuda"]["conda"]}


def specs(version: str) -> list[str]:
    """`packages` as arguments of conda's tools."""
    return [f"{name}=={number}" for name, number in packages(version).items()]


def installed(prefix: Path) -> dict[str, str]:
    """The packages of a conda environment with their versions; empty if it is not one."""
    records = [json.loads(path.read_text()) for path in prefix.glob("conda-meta/*.json")]
    return {record["name"]: record["version"] for record in records}


def tool() -> str:
    """The first of the tools on PATH."""
    path = next(filter(None, map(shutil.which, TOOLS)), None)
    if path is None:
        raise WorkspaceError(
            "ENV=conda needs micromamba, mamba or conda on PATH; install one, or use ENV=uv"
        )
    return path


def create_command(tool: str, prefix: Path, specs: list[str]) -> list[str]:
    """The command line that all three tools understand.

    Not `-f environment.yml`: its pip section would be installed too, 4 GB that uv installs anyway.
    Only one channel, so that no package comes from other channels of the user; its address (of a
    mirror) stays the user's setting.
    """
    return [tool, "create", "-y", "-p", str(prefix), "--override-channels", "-c", CHANNEL, *specs]
