# SPDX-License-Identifier: Apache-2.0
"""`make clean`: remove everything that can be regenerated, keep the user's work."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from workspace import verbs
from workspace.fork.tree_state import shown, state
from workspace.host.errors import WorkspaceError
from workspace.host.files import PARTIAL, generated, remove_partial
from workspace.host.paths import CLANGD, COMPILE_COMMANDS, FORK, HOME, MACHINE, ROOT, STATE
from workspace.pins import release

CACHES = (".pytest_cache", ".ruff_cache", ".hypothesis", ".cache/clangd")


def _remove(path: Path) -> None:
    if not path.exists():
        return
    print(f"· removing {shown(path)}", file=sys.stderr)
    if path.is_dir() and not path.is_symlink():
        # By another name first: what a kill leaves must not be taken for an environment or a tree.
        removed = path.with_name(f"{PARTIAL}{path.name}")
        path.rename(removed)
        shutil.rmtree(removed)
    else:
        path.unlink()


def _users_work(tree: Path) -> list[str]:
    try:
        current = state(tree)
    except WorkspaceError:
        return [f"all of {shown(tree)}, which this workspace did not make"]
    return current.own_work if current else []


def run(options: verbs.Clean) -> int:
    """Remove environments, tools, caches, and each tree without work of the user.

    The lock file stays, because this process holds it; recorded results stay, because they cannot
    be regenerated.
    """
    for folder in (ROOT, HOME, STATE, MACHINE, FORK, FORK / "releases"):
        remove_partial(folder)
    # By release: other folders with similar names are the user's.
    versions = {*release.pins()["vllm"]["release"], *(tree.name for tree in release.trees())}
    modes = ("uv", "conda")
    for path in (
        *(release.environment(mode, version) for mode in modes for version in sorted(versions)),
        *(ROOT / name for name in CACHES),
        COMPILE_COMMANDS,
        *([CLANGD] if generated(CLANGD) else []),
        *sorted({*STATE.glob("*"), *MACHINE.glob("*")} - {STATE / "lock"}),
    ):
        _remove(path)
    for path in (*release.trees(), release.link()):
        if path.is_symlink():
            continue
        work = _users_work(path)
        if work and not options.force:
            print(f"· keeping {shown(path)}, which contains work of yours:")
            print("\n".join(f"    {line}" for line in work[:20]))
            if len(work) > 20:
                print(f"    … and {len(work) - 20} more")
            print("  to remove it anyway: make clean FORCE=1")
            continue
        for line in work:
            print(f"· lost: {line}", file=sys.stderr)
        _remove(path)
    if release.link().is_symlink() and not release.link().exists():
        release.link().unlink()
    return 0
