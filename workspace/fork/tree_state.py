# SPDX-License-Identifier: Apache-2.0
"""The content of a release's tree: the pristine release, our patches, and the work of the user.

The tree is a git repository. `upstream/<version>` is the tag of the pristine release,
`refs/workspace/applied` the commit of the last of our patches: everything beyond it, and everything
uncommitted, is the user's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workspace.host.errors import WorkspaceError
from workspace.host.git import git
from workspace.host.paths import ROOT
from workspace.host.text import some
from workspace.pins import release

APPLIED = "refs/workspace/applied"
PATCHES_KEY = "workspace.patches"
VERSION_KEY = "workspace.version"


@dataclass(frozen=True)
class ForkState:
    """The current state of a release's tree."""

    version: str
    head: str
    applied: str
    patches_digest: str
    uncommitted: list[str]
    own_commits: list[str]

    @property
    def own_work(self) -> list[str]:
        """One line for everything that would be lost with the tree."""
        lost = [f"uncommitted: {line}" for line in self.uncommitted]
        return lost + [f"commit {line}" for line in self.own_commits]


def uncommitted(tree: Path) -> list[str]:
    """What is not committed in a tree: lines of git's status."""
    options = ("--porcelain=v1", "-z", "--untracked-files=all", "--no-renames")
    status = git("status", *options, tree=tree)
    return [entry for entry in status.split("\0") if entry]


def state(tree: Path | None = None) -> ForkState | None:
    """The state of a tree (by default of the selected release), None if it does not exist.

    Raises:
        WorkspaceError: this workspace did not make the folder.
    """
    tree = tree or release.tree()
    if not tree.exists():
        return None
    applied = ""
    if (tree / ".git").exists():
        applied = git("rev-parse", "-q", "--verify", APPLIED, tree=tree, check=False).strip()
    if not applied:
        raise release.foreign(tree)
    # Commits on all branches, not only on the one checked out.
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


def require(tree: Path | None = None) -> ForkState:
    """`state`, of a tree that must exist.

    Raises:
        WorkspaceError: it does not exist, or this workspace did not make the folder.
    """
    tree = tree or release.tree()
    current = state(tree)
    if current is None:
        raise WorkspaceError(f"{shown(tree)} does not exist; run: make dev")
    return current


def shown(path: Path) -> str:
    """A path for messages: relative to the checkout."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def require_no_edits(tree: Path, consequence: str) -> None:
    """Raise if an existing tree has uncommitted edits, with their `consequence` in the error."""
    current = state(tree)
    if current and current.uncommitted:
        names = some([entry[3:] for entry in current.uncommitted])
        raise WorkspaceError(
            f"{shown(tree)} has uncommitted edits ({names}){consequence}; commit or stash them "
            "there, then re-run"
        )


def require_switchable(version: str) -> None:
    """Raise if `vllm-fork/src` must not switch to `version` because of uncommitted edits.

    They would be safe in their tree, but an editor that has those files open by their path in src
    would save them into the other release.
    """
    before = release.active()
    if before not in (None, version):
        consequence = f", and vllm-fork/src would point at vLLM {version} instead"
        require_no_edits(release.tree(before), consequence)


def branch(tree: Path) -> str:
    """The branch that is checked out; without one, the commit."""
    name = git("symbolic-ref", "-q", "--short", "HEAD", tree=tree, check=False).strip()
    return name or git("rev-parse", "--short", "HEAD", tree=tree).strip()


def require_no_operation(tree: Path) -> None:
    """Raise if git is in the middle of a rebase, merge or the like."""
    operations = {
        "rebase-merge": "rebase", "rebase-apply": "rebase", "MERGE_HEAD": "merge",
        "CHERRY_PICK_HEAD": "cherry-pick", "REVERT_HEAD": "revert", "BISECT_LOG": "bisect",
    }  # fmt: skip
    for name, operation in operations.items():
        if (tree / ".git" / name).exists():
            raise WorkspaceError(
                f"git is in the middle of a {operation} in {shown(tree)}; finish it (see git "
                "status), then re-run"
            )
