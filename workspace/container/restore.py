# SPDX-License-Identifier: Apache-2.0
"""Put the mounted checkout into a container's own files, and say what it was.

    python3 -m workspace.container.restore CHECKOUT COMPILED

Runs in a container of the committed image, by the code of the checkout that is mounted at CHECKOUT;
the volume with what was compiled at run time is at COMPILED. Both end up where the mounts were, so
that the image runs without them. A commit of a container holds nothing that is mounted.

Taken along are the files that git tracks or would, and the trees of the fork with their binaries.
Their repositories are cloned: settings, remotes with passwords in their addresses, hooks and
reflogs stay behind. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from workspace.fork.tree_state import APPLIED, PATCHES_KEY, VERSION_KEY
from workspace.host.errors import WorkspaceError
from workspace.host.git import git, git_bytes

PLACE = Path("/workspaces/vllm-kernels")
RECORD = Path("/opt/vllm-kernels/snapshot")
COMPILED = Path("/cache/compiled")
NEVER = {"ccache"}
"""Speeds a compilation up, and can be gigabytes: a snapshot compiles nothing."""


def clone_repository(source: Path, target: Path) -> None:
    """The history of `source` as `target`/.git, on the same commit; no file is checked out."""
    head = git("rev-parse", "HEAD", tree=source).strip()
    # By its address: a clone that shares nothing with the source, and may be as shallow.
    git("clone", "-q", "--mirror", f"file://{source}", str(target / ".git"), tree=target)
    git("config", "core.bare", "false", tree=target)
    git("config", "--remove-section", "remote.origin", tree=target)
    branch = git("symbolic-ref", "-q", "HEAD", tree=source, check=False).strip()
    if branch:
        git("symbolic-ref", "HEAD", branch, tree=target)
    else:
        git("update-ref", "--no-deref", "HEAD", head, tree=target)


def copy(source: Path, target: Path, names: list[str]) -> None:
    """Files and links by their names, with their times: Python's bytecode stays valid."""
    for name in names:
        if (source / name).is_symlink() or (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name, follow_symlinks=False)


def files_as_they_are(tree: Path) -> str:
    """Git's name of all the files of a tree that it tracks or would; its index is left alone."""
    with tempfile.TemporaryDirectory() as work:
        scratch = {"GIT_INDEX_FILE": str(Path(work) / "index")}
        git("read-tree", "HEAD", tree=tree, env=scratch)
        git("add", "-A", tree=tree, env=scratch)
        return git("write-tree", tree=tree, env=scratch).strip()


def record(tree: Path, name: str) -> dict[str, Any]:
    """What this tree is: its commit, and all that differs from it as a diff beside the record.

    `tree` is the name of all the files as they are, so that whoever makes the state again knows
    that it is the same.
    """
    files = files_as_they_are(tree)
    options = ("--binary", "--no-ext-diff", "--no-renames")
    diff = git_bytes("diff", *options, "HEAD", files, tree=tree)
    (RECORD / f"{name}.diff").write_bytes(diff)
    return {
        "commit": git("rev-parse", "HEAD", tree=tree).strip(),
        "tree": files,
        "dirty": bool(diff),
        "diff_sha256": hashlib.sha256(diff).hexdigest(),
    }


def restore_workspace(source: Path) -> dict[str, Any]:
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", tree=source)
    clone_repository(source, PLACE)
    copy(source, PLACE, [name for name in names.split("\0") if name])
    link = source / "vllm-fork" / "src"
    if link.is_symlink():
        (PLACE / "vllm-fork" / "src").symlink_to(os.readlink(link))
    git("reset", "-q", "--mixed", tree=PLACE)
    return record(PLACE, "workspace")


def restore_fork(source: Path) -> dict[str, Any]:
    """One tree of the fork, with everything in it, whether git tracks it or not."""
    version = source.name
    target = PLACE / "vllm-fork" / "releases" / version
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    clone_repository(source, target)
    for key in (VERSION_KEY, PATCHES_KEY):
        git("config", key, git("config", key, tree=source).strip(), tree=target)
    inside = [path for path in (source / ".git").glob("workspace-*") if path.is_file()]
    for path in (*inside, source / ".git" / "info" / "exclude"):
        (target / ".git" / path.relative_to(source / ".git")).parent.mkdir(exist_ok=True)
        shutil.copy2(path, target / ".git" / path.relative_to(source / ".git"))
    git("reset", "-q", "--mixed", tree=target)
    found = record(target, f"vllm-{version}")
    applied = git("rev-parse", APPLIED, tree=target).strip()
    # Each as a mail, to read and to apply elsewhere.
    own = git_bytes("format-patch", "--stdout", "--binary", f"{applied}..HEAD", tree=target)
    (RECORD / f"vllm-{version}.patches").write_bytes(own)
    count = git("rev-list", "--count", f"{applied}..HEAD", tree=target).strip()
    return {**found, "applied": applied, "own_commits": int(count)}


def main(source: Path, compiled: Path) -> None:
    RECORD.mkdir(exist_ok=True)
    for old in RECORD.iterdir():
        old.unlink()
    for old in PLACE.iterdir():  # of a container that was made from a snapshot
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    found: dict[str, Any] = {"workspace": restore_workspace(source), "fork": {}}
    for tree in sorted((source / "vllm-fork" / "releases").glob("[!.]*")):
        found["fork"][tree.name] = restore_fork(tree)
    for path in sorted(compiled.iterdir()):
        if path.is_dir() and path.name not in NEVER:
            shutil.copytree(path, COMPILED / path.name, symlinks=True, dirs_exist_ok=True)
    text = json.dumps(found, indent=2)
    (RECORD / "record.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except WorkspaceError as error:
        sys.exit(str(error))
