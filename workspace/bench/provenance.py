# SPDX-License-Identifier: Apache-2.0
"""The sources, versions and machine of a run: what it takes to repeat a record."""

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
from typing import TypeVar

from workspace.bench.record import Binaries, GitState, Provenance
from workspace.fork import built_from, install, tree_state
from workspace.host.errors import WorkspaceError
from workspace.host.git import git
from workspace.host.paths import KERNELS, LOCKS, ROOT, lock_files
from workspace.pins import release

Source = TypeVar("Source", Binaries, GitState)

CPU_FLAGS = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"
)  # fmt: skip
"""The flags by which vLLM and oneDNN choose their CPU code."""


@dataclass(frozen=True)
class Expected:
    """What an engine imports if nothing shadows the environment's packages.

    `paths` is the module path of the environment's Python, `modules` the requested modules on it,
    `versions` the locked version of each package.
    """

    paths: list[Path]
    modules: set[str]
    versions: dict[str, str]
    kernels: Path = KERNELS


@cache
def expected(device: str, modules: frozenset[str]) -> Expected:
    """Ask the environment's Python, isolated from PYTHONPATH and the user's site-packages.

    Args:
        device: "cpu" or "cuda", which the environment was made for.
        modules: names of top-level modules.
    """
    from workspace.environment.lock import locked  # imports the package index's clients

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
        versions: dict[str, str] = {}  # the host's own packages, of any version
    else:
        versions = {n: entry.version for n, entry in locked(lock_files(version, device)).items()}
    return Expected([Path(path).resolve() for path in paths], set(found), versions)


def git_state(folder: Path) -> GitState:
    """The state of the git tree at `folder`.

    Raises:
        WorkspaceError: git cannot read it.
    """
    commit = git("rev-parse", "HEAD", tree=folder).strip()
    return GitState(commit=commit, dirty=bool(tree_state.uncommitted(folder)))


def fork_state() -> GitState:
    """The state of the selected release's tree.

    Raises:
        WorkspaceError: it does not exist, or this workspace did not make it.
    """
    state = tree_state.state()
    if state is None:
        raise WorkspaceError(f"{release.tree()} does not exist; run make dev")
    return GitState(commit=state.head, dirty=bool(state.uncommitted))


def binaries() -> Binaries:
    """The origin of the compiled files in the selected release's tree.

    Raises:
        WorkspaceError: one of them was changed by hand, or a build ended while it installed.
    """
    manifest, tree = built_from.read_manifest(), release.tree()
    edited = install.edited(tree, manifest, sorted(manifest.names()))
    if manifest.unfinished or edited:
        what = f"{edited[0]} was changed by hand" if edited else "a build was interrupted"
        raise WorkspaceError(f"{what}; run: make fork-build, or make dev BUILD=precompiled")
    cmake, rust = built_from.stale(tree, release.selected(), manifest)
    compiled = {name: build.sources for name, build in manifest.builds.items()}
    return Binaries(wheel=manifest.wheel, compiled=compiled, outdated=[*cmake, *rust])


def lock_hashes(folder: Path = LOCKS) -> dict[str, str]:
    """File name -> SHA-256 for every lock."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def collect(
    kernels: str, environment: dict[str, str], load_before: float
) -> tuple[Provenance, list[str]]:
    """The run's provenance, and an error for each source that cannot be read.

    Args:
        kernels: SHA-256 over all kernel sources.
        environment: versions that the engine's process reported.
        load_before: the machine's load average before the run.
    """
    errors: list[str] = []

    def read(name: str, state: Callable[[], Source]) -> Source | None:
        try:
            return state()
        except WorkspaceError as error:
            errors.append(f"cannot tell {name}: {error}")
            return None

    workspace = read("the commit of the workspace", lambda: git_state(ROOT))
    fork = read("the commit of the fork", fork_state)

    return Provenance(
        workspace=workspace,
        fork=fork,
        binaries=read("the origin of vLLM's binaries", binaries) if fork else None,
        locks=lock_hashes(),
        kernels=kernels,
        environment=environment,
        cpu=cpu_name(),
        cpu_flags=cpu_flags(),
        cores=len(os.sched_getaffinity(0)),
        load_before=round(load_before, 2),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
    ), errors


def cpu_name() -> str:
    """The CPU's model name."""
    return _cpuinfo().get("model name", platform.machine())


def cpu_flags() -> list[str]:
    """Those of `CPU_FLAGS` that the CPU has."""
    return [flag for flag in CPU_FLAGS if flag in _cpuinfo().get("flags", "").split()]


def _cpuinfo() -> dict[str, str]:
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
