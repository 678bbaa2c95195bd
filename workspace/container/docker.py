# SPDX-License-Identifier: Apache-2.0
"""Docker's own client, and what its complaints mean to somebody who wants to go on.

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
from typing import Any

from workspace.environment import index
from workspace.host.errors import WorkspaceError

KILLED = 128 + 9
"""Docker's status where a process was killed, or its container or the engine ended."""

TOOLKIT = "NVIDIA's Container Toolkit"
REMEDIES = [
    (
        r"cannot connect to the docker daemon|is the docker daemon running",
        "the Docker engine does not run; start it (Linux: sudo systemctl start docker, elsewhere "
        "Docker Desktop) and re-run",
    ),
    (
        r"permission denied.*(docker daemon|docker\.sock|docker api)",
        "Docker's engine runs, but not for this user; sudo usermod -aG docker $USER, log in again "
        "and re-run",
    ),
    (
        r"no space left on device|disk quota exceeded|enough free space",
        "Docker has no disk space left; docker system df shows what takes it, docker system prune "
        "frees some; then re-run",
    ),
    (
        r"failed to do request|pull access denied|failed to resolve source metadata|"
        r"manifest unknown|not found: manifest|unable to find image",
        "an image that is needed is not on this machine and no registry gave it; check its name "
        "and the network, or build on one that docker images lists: BASE_IMAGE=<name>",
    ),
    (
        r"buildx component is missing|buildkit is enabled but|unknown flag: --mount",
        "this Docker client cannot build with BuildKit; install its plugin (docker-buildx-plugin, "
        "or docker-buildx), or set DOCKER=<path of a client that can>",
    ),
    (
        r"could not select device driver|nvidia-container-cli|nvidia-container-runtime",
        f"Docker cannot hand this machine's GPU to a container; install or fix {TOOLKIT}, or "
        "go without: make container DEVICE=cpu",
    ),
]
"""What the engine says → what it means and what to do."""


def client() -> str:
    """Docker's client: DOCKER= if given, else the one on PATH.

    Raises:
        WorkspaceError: there is none.
    """
    asked = os.environ.get("DOCKER") or "docker"
    found = shutil.which(asked)
    if found is None:
        raise WorkspaceError(
            f"there is no {asked} here; install Docker (Debian, Ubuntu: apt-get install "
            "docker.io), or set DOCKER=<path of its client>"
        )
    return found


def _explain(complaint: str, what: str) -> str:
    for pattern, meaning in REMEDIES:
        if re.search(pattern, complaint, re.IGNORECASE):
            return meaning
    lines = [line.strip() for line in complaint.splitlines() if line.strip()] or ["no message"]
    told = [line for line in lines if "response from daemon" in line] or lines[-1:]
    # BuildKit repeats the whole command of the step that failed.
    reason = re.sub(r"executor failed running \[.*\]", "a step failed", told[0])
    return f"{what}: {reason[:400]}"


def docker(*arguments: str, failure: str = "") -> str:
    """Run `docker ARGUMENTS`, which must succeed; returns what it prints.

    Raises:
        WorkspaceError: with what the engine's complaint means, else with `failure` and its words.
    """
    result = subprocess.run([client(), *arguments], capture_output=True, check=False)
    if result.returncode:
        complaint = result.stderr.decode(errors="replace")
        raise WorkspaceError(_explain(complaint, failure or f"docker {arguments[0]} failed"))
    return result.stdout.decode(errors="replace").strip()


def show(
    *arguments: str,
    failure: str,
    env: dict[str, str] | None = None,
    brief: Callable[[str], str] = str,
) -> None:
    """`docker`, with its output shown as it comes, each line as `brief` has it ("": not at all).
    The last lines are shown in full when it fails.

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
        told = index.hide("".join(last))
        if brief is not str:
            print("".join(f"{line[:200]}\n" for line in told.splitlines()), file=sys.stderr)
        if process.returncode == KILLED:
            raise WorkspaceError(
                f"{failure}: it was killed: the container or the engine was stopped, or memory ran "
                "out; run the same command again"
            )
        raise WorkspaceError(_explain(told, failure))


def inspect(kind: str, name: str) -> dict[str, Any] | None:
    """What the engine knows of an image, a container or a volume; None where there is none."""
    result = subprocess.run(
        [client(), kind, "inspect", name], capture_output=True, text=True, check=False
    )
    if result.returncode:
        if re.search(r"no such|not found", result.stderr, re.IGNORECASE):
            return None
        raise WorkspaceError(_explain(result.stderr, f"docker {kind} inspect {name}"))
    found: dict[str, Any] = json.loads(result.stdout)[0]
    return found


def labels(found: dict[str, Any] | None) -> dict[str, str]:
    """Those of an inspected image or container; empty where there is none, or it has none."""
    told: dict[str, str] = (found["Config"].get("Labels") if found else None) or {}
    return told


def has_nvidia_runtime() -> bool:
    """Whether the engine was taught to hand on GPUs."""
    return "nvidia" in docker("info", "--format", "{{json .Runtimes}}")


def architecture() -> str:
    """Of the engine's containers, as `uname -m` says it in them: macOS calls aarch64 arm64, and the
    engine may be on another machine."""
    # Not `docker info`, which has no complaint to show where there is no engine.
    told = docker("version", "--format", "{{.Server.Arch}}")
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(told, told)
