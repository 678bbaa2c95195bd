# SPDX-License-Identifier: Apache-2.0
"""Run Docker's client, and explain its errors.

Standard library only: this runs on the host, before there is an environment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workspace.environment import index
from workspace.host.errors import WorkspaceError

KILLED = 128 + 9
"""Docker's exit status if a process was killed, or its container or the engine ended."""

TOOLKIT = "NVIDIA's Container Toolkit"
REMEDIES = [
    (
        r"cannot connect to the docker daemon|is the docker daemon running",
        "the Docker engine is not running; start it (Linux: sudo systemctl start docker, elsewhere "
        "Docker Desktop) and re-run",
    ),
    (
        r"permission denied.*(docker daemon|docker\.sock|docker api)",
        "this user may not use the Docker engine; sudo usermod -aG docker $USER, log in again "
        "and re-run",
    ),
    (
        r"no space left on device|disk quota exceeded|enough free space",
        "Docker has no disk space left; docker system df shows what uses it, docker system prune "
        "frees some; then re-run",
    ),
    (
        r"failed to do request|pull access denied|failed to resolve source metadata|"
        r"manifest unknown|not found: manifest|unable to find image",
        "a required image is not on this machine and could not be pulled; check its name and the "
        "network, or build on one that docker images lists: BASE_IMAGE=<name>",
    ),
    (
        r"buildx component is missing|buildkit is enabled but|unknown flag: --mount",
        "this Docker client cannot build with BuildKit; install its plugin (docker-buildx-plugin, "
        "or docker-buildx), or set DOCKER=<path of a client that can>",
    ),
    (
        r"could not select device driver|nvidia-container-cli|nvidia-container-runtime",
        f"Docker cannot give a container this machine's GPU; install or fix {TOOLKIT}, or do "
        "without: make container DEVICE=cpu",
    ),
]
"""Pattern in the engine's error → what it means and what to do."""


@dataclass(frozen=True)
class Image:
    """An image of the engine."""

    identity: str
    labels: dict[str, str]
    layers: list[str]
    """DiffIDs, the lowest first."""


@dataclass(frozen=True)
class Container:
    """A container of the engine."""

    identity: str
    image: str
    """The identity of its image."""
    running: bool
    environment: list[str]
    """`NAME=value` each."""
    labels: dict[str, str]


def client() -> str:
    """Docker's client: DOCKER= if given, else the one on PATH.

    Raises:
        WorkspaceError: there is none.
    """
    name = os.environ.get("DOCKER") or "docker"
    path = shutil.which(name)
    if path is None:
        raise WorkspaceError(
            f"{name} is not installed; install Docker (Debian, Ubuntu: apt-get install "
            "docker.io), or set DOCKER=<path of its client>"
        )
    return path


def _explain(errors: str, failure: str) -> str:
    for pattern, remedy in REMEDIES:
        if re.search(pattern, errors, re.IGNORECASE):
            return remedy
    lines = [line.strip() for line in errors.splitlines() if line.strip()] or ["no message"]
    line = next((line for line in lines if "response from daemon" in line), lines[-1])
    # BuildKit repeats the whole command of the step that failed.
    reason = re.sub(r"executor failed running \[.*\]", "a step failed", line)
    return f"{failure}: {reason[:400]}"


def docker(*arguments: str, failure: str = "") -> str:
    """Run `docker ARGUMENTS`, which must succeed; returns what it prints.

    Raises:
        WorkspaceError: a known error with its remedy, else `failure` and the engine's message.
    """
    result = subprocess.run([client(), *arguments], capture_output=True, check=False)
    if result.returncode:
        errors = result.stderr.decode(errors="replace")
        raise WorkspaceError(_explain(errors, failure or f"docker {arguments[0]} failed"))
    return result.stdout.decode(errors="replace").strip()


def show(
    *arguments: str,
    failure: str,
    env: dict[str, str] | None = None,
    brief: Callable[[str], str] = str,
) -> None:
    """`docker`, with its output shown as it comes, each line shortened by `brief`. The last lines
    are shown in full when it fails.

    Raises:
        WorkspaceError: as `docker`.
    """
    with subprocess.Popen(
        [client(), *arguments],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout
        last: deque[str] = deque(maxlen=40)
        for line in process.stdout:
            last.append(line)
            print(brief(line), end="", file=sys.stderr, flush=True)
    if process.returncode:
        output = index.redact("".join(last))
        if brief is not str:
            print("".join(f"{line[:200]}\n" for line in output.splitlines()), file=sys.stderr)
        if process.returncode == KILLED:
            raise WorkspaceError(
                f"{failure}: it was killed: the container or the engine was stopped, or memory ran "
                "out; re-run"
            )
        raise WorkspaceError(_explain(output, failure))


def inspect_image(name: str) -> Image | None:
    """The image of this name or identity; None if there is none."""
    found = _inspect("image", name)
    if found is None:
        return None
    labels = found["Config"].get("Labels") or {}
    return Image(found["Id"], labels, found.get("RootFS", {}).get("Layers", []))


def inspect_container(name: str) -> Container | None:
    """The container of this name or identity; None if there is none."""
    found = _inspect("container", name)
    if found is None:
        return None
    settings = found["Config"]
    return Container(
        identity=found["Id"],
        image=found["Image"],
        running=found["State"]["Running"],
        environment=settings.get("Env") or [],
        labels=settings.get("Labels") or {},
    )


def _inspect(kind: str, name: str) -> dict[str, Any] | None:
    result = subprocess.run(
        [client(), kind, "inspect", name], capture_output=True, text=True, check=False
    )
    if result.returncode:
        if re.search(r"no such|not found", result.stderr, re.IGNORECASE):
            return None
        raise WorkspaceError(_explain(result.stderr, f"docker {kind} inspect {name}"))
    found: dict[str, Any] = json.loads(result.stdout)[0]
    return found


def has_nvidia_runtime() -> bool:
    """Whether the engine can give GPUs to containers."""
    return "nvidia" in docker("info", "--format", "{{json .Runtimes}}")


def architecture() -> str:
    """Of the engine's containers, as `uname -m` says it in them: the engine may be on another
    machine, and macOS calls aarch64 arm64."""
    # Not `docker info`, which prints no error without an engine.
    name = docker("version", "--format", "{{.Server.Arch}}")
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)
