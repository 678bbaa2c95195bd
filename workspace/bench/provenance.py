# SPDX-License-Identifier: Apache-2.0
"""From which sources, on what machine: what a record needs to be repeated."""

import hashlib
import os
import platform
import subprocess
from pathlib import Path

from pydantic import BaseModel

from workspace.paths import LOCKS, ROOT

CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""The flags by which vLLM and oneDNN choose their CPU code."""


class GitState(BaseModel):
    """A git tree: its commit, and whether anything in it is not committed."""

    commit: str
    dirty: bool


class Provenance(BaseModel):
    """Sources, versions and machine of a run.

    `environment` holds the versions as the engine's process saw them; `locks` the SHA-256 of the
    requirement locks; `kernels` the SHA-256 over all kernel sources.
    """

    workspace: GitState | None
    fork: GitState | None
    locks: dict[str, str]
    kernels: str
    environment: dict[str, str]
    cpu: str
    cpu_flags: list[str]
    cores: int
    system: str
    load_before: float
    """Processes that were running or waiting in the minute before the run, not ours."""


def git_state(folder: Path) -> GitState | None:
    """The state of the git tree that holds `folder`; None where there is none."""
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain")
    if commit is None or status is None:
        return None
    return GitState(commit=commit, dirty=bool(status))


def fork_state(vllm_folder: Path) -> GitState | None:
    """The state of the tree vLLM was imported from; None for one that is not in git (a wheel)."""
    top = _git(vllm_folder, "rev-parse", "--show-toplevel")
    # A wheel in an environment inside this checkout would otherwise pass for the checkout.
    if top is None or Path(top).resolve() == ROOT:
        return None
    return git_state(vllm_folder)


def lock_hashes(folder: Path = LOCKS) -> dict[str, str]:
    """File name -> SHA-256 for every lock."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def collect(
    vllm_folder: Path, kernels: str, environment: dict[str, str], load_before: float
) -> Provenance:
    """Everything about this run that the engine's process did not already say."""
    return Provenance(
        workspace=git_state(ROOT),
        fork=fork_state(vllm_folder),
        locks=lock_hashes(),
        kernels=kernels,
        environment=environment,
        cpu=cpu_name(),
        cpu_flags=_cpu_flags(),
        cores=len(os.sched_getaffinity(0)),
        load_before=round(load_before, 2),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def cpu_name() -> str:
    """The model name that the CPU gives itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _cpu_flags() -> list[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return [flag for flag in CPU_FLAGS if flag in line.split()]
    return []


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
