# SPDX-License-Identifier: Apache-2.0
"""ENV=conda: the environment whose Python, compilers and nvcc come from conda-forge.

conda, mamba or micromamba brings what pins.toml has for it, by exact version; the Python packages
come from the lock, through uv, as in every other environment. environment.yml says the same for
those who make such an environment without this workspace.

Standard library only: this serves before the environment exists.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from workspace.host.errors import WorkspaceError

TOOLS = ("micromamba", "mamba", "conda")
CHANNEL = "conda-forge"


def packages(pins: dict[str, Any], version: str) -> dict[str, str]:
    """What a release's environment consists of, apart from the lock; each at one version."""
    return {**pins["conda"], **pins["vllm"]["release"][version]["cuda"]["conda"]}


def specs(pins: dict[str, Any], version: str) -> list[str]:
    """`packages`, as conda's tools take them."""
    return [f"{name}=={number}" for name, number in packages(pins, version).items()]


def installed(prefix: Path) -> dict[str, str]:
    """The packages of a conda environment with their versions; empty where it is none."""
    records = [json.loads(path.read_text()) for path in prefix.glob("conda-meta/*.json")]
    return {record["name"]: record["version"] for record in records}


def complete(prefix: Path, wanted: list[str]) -> bool:
    return set(wanted) <= {f"{name}=={number}" for name, number in installed(prefix).items()}


def tool() -> str:
    """The first of the tools on PATH."""
    found = next(filter(None, map(shutil.which, TOOLS)), None)
    if found is None:
        raise WorkspaceError(
            "ENV=conda needs micromamba, mamba or conda on PATH; install one, or use ENV=uv"
        )
    return found


def create_command(tool: str, prefix: Path, wanted: list[str]) -> list[str]:
    """The command line that all three tools understand.

    Not `-f environment.yml`: they would install its pip section too, 4 GB that uv then finds at
    the same versions. The channel is named alone, so that no other of the user's mixes in; where
    it lies (a mirror) stays the user's setting.
    """
    return [tool, "create", "-y", "-p", str(prefix), "--override-channels", "-c", CHANNEL, *wanted]
