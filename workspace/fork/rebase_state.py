# SPDX-License-Identifier: Apache-2.0
"""The state file of a rebase in progress, with which it can be continued or undone.

It is written first and removed last, so that this holds after a kill at any moment.
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

FILE = STATE / "rebase.json"


@dataclass(frozen=True)
class Rebase:
    """A rebase of the commits up to `tip` from one release to another.

    Args:
        origin: the release of the commits.
        target: the new release.
        tip: the last commit.
        made: whether the rebase created the new tree.
        branch: the branch of the new tree that gets the commits.
        onto: the commit in the new tree on which the commits go, and to which an abort returns;
            empty until that tree exists.
        pins: text to be added to pins.toml in the end.
        stopped: git waits for the user, so the content of the new tree is the user's work now.
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
    return Rebase(**json.loads(FILE.read_text())) if FILE.exists() else None


def write(rebase: Rebase) -> None:
    write_file(FILE, json.dumps(asdict(rebase), indent=1).encode())


def release_for(verb: str) -> str:
    """The release that a verb works on.

    Raises:
        WorkspaceError: it is not pinned, or a rebase to it is not finished.
    """
    rebase = read()
    if rebase and verb in ("fork-rebase", "upgrade"):
        return rebase.origin
    version = release.selected()
    if rebase and version == rebase.target:
        raise WorkspaceError(f"a rebase is in progress {summary()}")
    release.require_pinned(version)
    return version


def in_git(tree: Path) -> bool:
    """Whether git is in the middle of a rebase."""
    return any((tree / ".git" / name).exists() for name in ("rebase-merge", "rebase-apply"))


def conflicts(tree: Path) -> list[str]:
    """Files with conflicts, in git's order."""
    listed = git("diff", "--name-only", "--diff-filter=U", "-z", tree=tree)
    return [name for name in listed.split("\0") if name]


def position(tree: Path) -> str:
    """The commit at which git stopped: "3 of 4"."""
    paths = [tree / ".git" / "rebase-merge" / name for name in ("msgnum", "end")]
    return " of ".join(path.read_text().strip() if path.exists() else "0" for path in paths)


def summary() -> str | None:
    """The rebase in progress in one line, with the next command; None without a rebase."""
    rebase = read()
    if rebase is None:
        return None
    what = f"from vLLM {rebase.origin} to {rebase.target}"
    undo = "or to undo it: make fork-rebase ABORT=1"
    if not rebase.tree.exists() or not in_git(rebase.tree):
        return f"{what}; continue with: make fork-rebase, {undo}"
    names = conflicts(rebase.tree)
    where = f"conflicts in {', '.join(names)}" if names else "all conflicts resolved"
    return f"{what}, at commit {position(rebase.tree)}, {where}; then: make fork-rebase, {undo}"
