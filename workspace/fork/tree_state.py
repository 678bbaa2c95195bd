# SPDX-License-Identifier: Apache-2.0
"""What is in the tree of a release: the pristine release, our patches, and the user's own work.

The tree is a git repository of its own. `upstream/<version>` is the tag of the pristine
release, `refs/workspace/applied` the commit after the last of our patches: everything beyond
it, and everything uncommitted, is the user's.

Standard library only: `make clean` asks here when there is no environment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workspace.host.errors import WorkspaceError
from workspace.host.git import git
from workspace.host.paths import ROOT
from workspace.pins import release

APPLIED = "refs/workspace/applied"
PATCHES_KEY = "workspace.patches"
VERSION_KEY = "workspace.version"


@dataclass(frozen=True)
class ForkState:
    """A release's tree as it is now."""

    version: str
    head: str
    applied: str
    patches_digest: str
    uncommitted: list[str]
    own_commits: list[str]

    @property
    def own_work(self) -> list[str]:
        """What would be lost with the tree, in words; empty when nothing would."""
        lost = [f"uncommitted: {line}" for line in self.uncommitted]
        return lost + [f"commit {line}" for line in self.own_commits]


def uncommitted(tree: Path) -> list[str]:
    """What is not committed in a tree, as git's status has it."""
    options = ("--porcelain=v1", "-z", "--untracked-files=all", "--no-renames")
    status = git("status", *options, tree=tree)
    return [entry for entry in status.split("\0") if entry]


def state(tree: Path | None = None) -> ForkState | None:
    """The state of a tree (the selected release's, if none is given), or None where there is none.

    Raises:
        WorkspaceError: something is at that place which this workspace did not make.
    """
    tree = tree or release.tree()
    if not tree.exists():
        return None
    applied = ""
    if (tree / ".git").exists():
        applied = git("rev-parse", "-q", "--verify", APPLIED, tree=tree, check=False).strip()
    if not applied:
        raise WorkspaceError(
            f"{tree} is there, but this workspace did not make it; move it away and run: make dev"
        )
    # Commits on any branch are the user's as much as those on the one checked out.
    own = git("log", "--format=%h %s", "--branches", "HEAD", f"^{APPLIED}", tree=tree)
    stash = git("stash", "list", "--format=%gd %s", tree=tree)
    return ForkState(
        version=git("config", VERSION_KEY, tree=tree, check=False).strip(),
        head=git("rev-parse", "HEAD", tree=tree).strip(),
        applied=applied,
        patches_digest=git("config", PATCHES_KEY, tree=tree, check=False).strip(),
        uncommitted=uncommitted(tree),
        own_commits=[*own.splitlines(), *stash.splitlines()],
    )


def shown(tree: Path) -> str:
    """A tree's place in the checkout, for messages."""
    return str(tree.relative_to(ROOT)) if tree.is_relative_to(ROOT) else str(tree)


def require_switchable(version: str) -> None:
    """Raise where `vllm-fork/src` must not change to `version`: uncommitted edits are in the way.

    They would be safe, each tree keeps its own. But an editor that has those files open by their
    name in src would save them into the other release.
    """
    before = release.active()
    if before in (None, version):
        return
    tree = release.tree(before)
    found = state(tree)
    if found and found.uncommitted:
        names = ", ".join(entry[3:] for entry in found.uncommitted[:3])
        more = ", …" if len(found.uncommitted) > 3 else ""
        raise WorkspaceError(
            f"{shown(tree)} has uncommitted edits ({names}{more}), and vllm-fork/src would show "
            f"vLLM {version} in their place; commit or stash them there, then run this again"
        )


def switch(version: str) -> str | None:
    """Let `vllm-fork/src` show the tree of `version`; the release it showed before, if another."""
    require_switchable(version)
    before = release.active()
    release.activate(version)
    return before if before != version else None


def branch(tree: Path) -> str:
    """The branch that is checked out, or the commit where none is."""
    name = git("symbolic-ref", "-q", "--short", "HEAD", tree=tree, check=False).strip()
    return name or git("rev-parse", "--short", "HEAD", tree=tree).strip()


def require_no_operation(tree: Path) -> None:
    """Raise where git is in the middle of something there."""
    names = {
        "rebase-merge": "rebase", "rebase-apply": "rebase", "MERGE_HEAD": "merge",
        "CHERRY_PICK_HEAD": "cherry-pick", "REVERT_HEAD": "revert", "BISECT_LOG": "bisect",
    }  # fmt: skip
    for name, operation in names.items():
        if (tree / ".git" / name).exists():
            raise WorkspaceError(
                f"git is in the middle of a {operation} in {shown(tree)}; end it there (git "
                "status says how), then run this again"
            )
