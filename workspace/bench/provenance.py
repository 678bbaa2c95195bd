# SPDX-License-Identifier: Apache-2.0
"""From which sources, on what machine: what a record needs to be repeated."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import BaseModel

from workspace.fork import tree_state
from workspace.host.errors import WorkspaceError
from workspace.host.git import git
from workspace.host.paths import KERNELS, LOCKS, ROOT, lock_files
from workspace.pins import release

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


@dataclass(frozen=True)
class Expected:
    """What an engine of this environment imports where nothing goes before the environment.

    `paths` is where the environment's Python looks, `modules` what it finds there of those asked
    for, `versions` the locked version of each package.
    """

    paths: list[Path]
    modules: set[str]
    versions: dict[str, str]
    kernels: Path = KERNELS


@cache
def expected(device: str, modules: frozenset[str]) -> Expected:
    """Ask the environment's Python, kept apart from PYTHONPATH and the user's own packages.

    Args:
        device: "cpu" or "cuda", which the environment was made for.
        modules: names of modules at the top level that are of interest.
    """
    from workspace.environment.lock import locked  # and with it all that talks to a package index

    code = (
        "import json, sys; from importlib.util import find_spec\n"
        "names = json.load(sys.stdin)\n"
        "found = [name for name in names if name in sys.modules or find_spec(name)]\n"
        "print(json.dumps([sys.path, found]))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        input=json.dumps(sorted(modules)),
        capture_output=True,
        text=True,
        check=True,
    )
    paths, found = json.loads(done.stdout.splitlines()[-1])
    version = release.selected()
    if release.environment("system", version).resolve() == Path(sys.prefix).resolve():
        versions = {}  # the host's own packages, whatever they are
    else:
        versions = {n: entry.version for n, entry in locked(lock_files(version, device)).items()}
    return Expected([Path(path).resolve() for path in paths], set(found), versions)


def git_state(folder: Path) -> GitState:
    """The state of the git tree at `folder`.

    Raises:
        WorkspaceError: there is none, or git cannot read it.
    """
    commit = git("rev-parse", "HEAD", tree=folder).strip()
    return GitState(commit=commit, dirty=bool(tree_state.uncommitted(folder)))


def fork_state() -> GitState:
    """The state of the selected release's tree.

    Raises:
        WorkspaceError: there is none, or it is not one that this workspace made.
    """
    found = tree_state.state()
    if found is None:
        raise WorkspaceError(f"{release.tree()} is not there; run: make dev")
    return GitState(commit=found.head, dirty=bool(found.uncommitted))


def lock_hashes(folder: Path = LOCKS) -> dict[str, str]:
    """File name -> SHA-256 for every lock."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def collect(
    kernels: str, environment: dict[str, str], load_before: float
) -> tuple[Provenance, list[str]]:
    """Everything about this run that the engine's process did not already say, and which sources
    could not be read."""
    unknown: list[str] = []

    def read(name: str, state: Callable[[], GitState]) -> GitState | None:
        try:
            return state()
        except WorkspaceError as error:
            unknown.append(f"the commit of the {name} cannot be read: {error}")
            return None

    return Provenance(
        workspace=read("workspace", lambda: git_state(ROOT)),
        fork=read("fork", fork_state),
        locks=lock_hashes(),
        kernels=kernels,
        environment=environment,
        cpu=cpu_name(),
        cpu_flags=_cpu_flags(),
        cores=len(os.sched_getaffinity(0)),
        load_before=round(load_before, 2),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
    ), unknown


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
