# SPDX-License-Identifier: Apache-2.0
"""Pack a git tree with its uncommitted edits, which become one more commit.

The result is a bare repository with only what the tree's branches, tags and stash refer to, in one
pack, without the tree's settings, remotes, hooks and credentials. `unbundle.restore` makes a tree
of it again.

Standard library only: a host without an environment compares its trees with those of a bundle.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from workspace.bundle.unbundle import WORKTREE
from workspace.fork.tree_state import require_no_operation
from workspace.host.errors import WorkspaceError
from workspace.host.git import git

FIXED = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (
        ("NAME", "bundle"),
        ("EMAIL", "bundle@localhost"),
        ("DATE", "2000-01-01T00:00:00Z"),
    )
}
"""One name and date for the commit of edits: the same edits are the same commit."""


def _folder(tree: Path, which: str) -> Path:
    return (tree / git("rev-parse", which, tree=tree).strip()).resolve()


def snapshot(tree: Path, bare: Path) -> str:
    """Commit the files of `tree` as they are now to the new repository `bare`, which borrows the
    tree's objects; returns the commit. Neither the tree nor its index is touched.

    Raises:
        WorkspaceError: the tree contains another git repository, whose files git would leave out.
    """
    common = _folder(tree, "--git-common-dir")
    form = git("rev-parse", "--show-object-format", tree=tree).strip()
    bare.mkdir(parents=True)
    git("init", "-q", "--bare", "--template=", f"--object-format={form}", ".", tree=bare)
    (bare / "info").mkdir(exist_ok=True)
    (bare / "objects" / "info").mkdir(exist_ok=True)
    (bare / "objects" / "info" / "alternates").write_text(f"{common / 'objects'}\n")
    folder = _folder(tree, "--git-dir")
    # With the user's setting core.splitIndex, the index is in two files.
    shared = [(path.name, folder) for path in folder.glob("sharedindex.*")]
    for name, source in (("info/exclude", common), ("shallow", common), ("index", folder), *shared):
        if (source / name).exists():
            # With its time: git looks into a file only if it changed since the index was written,
            # or in the same second.
            shutil.copy2(source / name, bare / name)
    variables = {"GIT_DIR": str(bare), "GIT_WORK_TREE": str(tree)}
    git("add", "--all", ".", tree=tree, env=variables)
    staged = git("ls-files", "--stage", "-z", tree=tree, env=variables).split("\0")
    nested = [line.split("\t", 1)[1] for line in staged if line.startswith("160000 ")]
    if nested:
        raise WorkspaceError(
            f"{tree / nested[0]} is a git repository inside {tree}, and would be packed empty; "
            "move it away, or have git ignore it"
        )
    files = git("write-tree", tree=tree, env=variables).strip()
    head = git("rev-parse", "HEAD", tree=tree).strip()
    (bare / "index").unlink()
    return git("commit-tree", "-p", head, "-m", "edits", files, tree=bare, env=FIXED).strip()


def content(commit: str, bare: Path) -> str:
    """The hash of a commit's files."""
    return git("rev-parse", f"{commit}^{{tree}}", tree=bare).strip()


def pack(tree: Path, bare: Path, *, everything: bool, settings: tuple[str, ...] = ()) -> None:
    """Write `tree` to the new folder `bare`: the branch that is checked out, or with `everything`
    all branches, tags, the workspace's refs and the stash.

    Raises:
        WorkspaceError: a git operation is unfinished there.
    """
    require_no_operation(tree)
    edited = snapshot(tree, bare)
    head = git("rev-parse", "HEAD", tree=tree).strip()
    branch = git("symbolic-ref", "-q", "HEAD", tree=tree, check=False).strip()
    wanted = {WORKTREE: edited} | ({branch: head} if branch else {})
    if everything:
        names = ("refs/heads", "refs/tags", "refs/workspace", "refs/stash")
        listing = git("for-each-ref", "--format=%(objectname) %(refname)", *names, tree=tree)
        wanted |= {line.split(" ", 1)[1]: line.split(" ", 1)[0] for line in listing.splitlines()}
    for name, commit in wanted.items():
        git("update-ref", name, commit, tree=bare)
    stash = _folder(tree, "--git-common-dir") / "logs" / "refs" / "stash"
    if everything and stash.exists():  # all but the newest are in this log only
        (bare / "logs" / "refs").mkdir(parents=True, exist_ok=True)
        shutil.copy(stash, bare / "logs" / "refs" / "stash")
    if branch:
        git("symbolic-ref", "HEAD", branch, tree=bare)
    else:
        git("update-ref", "--no-deref", "HEAD", head, tree=bare)
    for key in settings:
        value = git("config", key, tree=tree, check=False).strip()
        git("config", key, value, tree=bare)
    git("repack", "-a", "-d", "-q", tree=bare)
    # The pack holds everything now: nothing is borrowed any more.
    (bare / "objects" / "info" / "alternates").unlink()
    (bare / "info" / "exclude").unlink(missing_ok=True)
    git("pack-refs", "--all", tree=bare)
    git("rev-list", "--objects", "--all", "--quiet", tree=bare)
    for pack_file in (bare / "objects" / "pack").iterdir():
        pack_file.chmod(0o644)
