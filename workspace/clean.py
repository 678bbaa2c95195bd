# SPDX-License-Identifier: Apache-2.0
"""`make clean`: remove what can be made again, keep what is the user's.

Standard library only: it removes the environment, so it runs outside of it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from workspace import verbs
from workspace.fork.tree_state import shown, state
from workspace.host.errors import WorkspaceError
from workspace.host.files import PARTIAL
from workspace.host.paths import FORK, MACHINE, ROOT, STATE
from workspace.pins import release

CACHES = (".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis")


def _remove(path: Path) -> None:
    if not path.exists():
        return
    print(f"· removing {shown(path)}", file=sys.stderr)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _environments() -> list[Path]:
    """Those that a release has here; another folder of such a name is the user's."""
    versions = {*release.pins()["vllm"]["release"], *(tree.name for tree in release.trees())}
    return [release.environment(mode, one) for mode in ("uv", "conda") for one in sorted(versions)]


def _users_work(tree: Path) -> list[str]:
    try:
        found = state(tree)
    except WorkspaceError:
        # Not made by us, so all of it is the user's.
        return [f"all of {tree.relative_to(ROOT)}, which this workspace did not make"]
    return found.own_work if found else []


def run(options: verbs.Clean) -> int:
    """Remove environments, tools, caches, and each tree that holds nothing of the user's.

    The lock file stays, because this process holds it; recorded results stay, because a
    measurement cannot be made again.
    """
    for path in _environments():
        _remove(path)
    for name in CACHES:
        _remove(ROOT / name)
    for path in sorted({*STATE.glob("*"), *MACHINE.glob("*")}):
        if path != STATE / "lock":
            _remove(path)
    for path in (*FORK.glob(f"{PARTIAL}*"), *FORK.glob(f"releases/{PARTIAL}*")):
        _remove(path)
    for path in (*release.trees(), release.link()):
        if path.is_symlink():
            continue
        work = _users_work(path) if path.exists() else []
        if work and not options.force:
            print(f"· keeping {path.relative_to(ROOT)}: it holds work of yours:")
            print("\n".join(f"    {line}" for line in work[:20]))
            if len(work) > 20:
                print(f"    … and {len(work) - 20} more")
            print("  to remove it all the same: make clean FORCE=1")
            continue
        for line in work:
            print(f"· lost: {line}", file=sys.stderr)
        _remove(path)
    if release.link().is_symlink() and not release.link().exists():
        release.link().unlink()
    return 0
