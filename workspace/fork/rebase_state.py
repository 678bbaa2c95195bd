# SPDX-License-Identifier: Apache-2.0
"""What a rebase that is under way needs to be continued or taken back.

Written before anything else happens and removed last, so that a rebase which is killed at any
moment can be continued or undone.

Standard library only: `make fork-status` asks here without an environment.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from workspace.host.errors import WorkspaceError
from workspace.host.files import write_file
from workspace.host.git import git
from workspace.host.paths import STATE
from workspace.pins import release

PLACE = STATE / "rebase.json"


@dataclass(frozen=True)
class Rebase:
    """From which commit of which release to which other one.

    `onto` is the commit of the new release's tree that the commits go on top of, and the one that
    its branch returns to; empty until that tree is there. `made` says that the rebase made the
    tree. `pins` is what success adds to pins.toml. `stopped`: git wants the user's decision, so
    what is in the new tree is the user's from now on.
    """

    origin: str
    target: str
    tip: str
    made: bool
    branch: str = "main"
    onto: str = ""
    pins: str = ""
    stopped: bool = False

    @property
    def tree(self) -> Path:
        return release.tree(self.target)


def read() -> Rebase | None:
    return Rebase(**json.loads(PLACE.read_text())) if PLACE.exists() else None


def write(rebase: Rebase) -> None:
    write_file(PLACE, json.dumps(asdict(rebase), indent=1).encode())


def remove() -> None:
    PLACE.unlink(missing_ok=True)


def release_for(verb: str) -> str:
    """The release that a verb works on.

    Raises:
        WorkspaceError: it is not pinned, or a rebase to it is not done.
    """
    rebase = read()
    if rebase and verb == "fork-rebase":
        return rebase.origin
    version = release.selected()
    if rebase and version == rebase.target:
        raise WorkspaceError(f"a rebase is under way {summary()}")
    release.require_pinned(version)
    return version


def in_git(tree: Path) -> bool:
    """Whether git itself is in the middle of a rebase there."""
    return any((tree / ".git" / name).exists() for name in ("rebase-merge", "rebase-apply"))


def conflicts(tree: Path) -> list[str]:
    """Files with conflicts, in git's order."""
    listed = git("diff", "--name-only", "--diff-filter=U", "-z", tree=tree)
    return [name for name in listed.split("\0") if name]


def progress(tree: Path) -> tuple[int, int]:
    """At which of how many commits git stopped."""
    folder = tree / ".git" / "rebase-merge"
    numbers = [(folder / name) for name in ("msgnum", "end")]
    done, total = (int(path.read_text()) if path.exists() else 0 for path in numbers)
    return done, total


def summary() -> str | None:
    """The rebase under way in one line, with what to do next; None where there is none."""
    rebase = read()
    if rebase is None:
        return None
    what = f"from vLLM {rebase.origin} to {rebase.target}"
    back = "or back: make fork-rebase ABORT=1"
    if not rebase.tree.exists() or not in_git(rebase.tree):
        return f"{what}; go on with: make fork-rebase, {back}"
    done, total = progress(rebase.tree)
    names = conflicts(rebase.tree)
    where = f"conflicts in {', '.join(names)}" if names else "all conflicts resolved"
    return f"{what}, at commit {done} of {total}, {where}; then: make fork-rebase, {back}"
