# SPDX-License-Identifier: Apache-2.0
"""Copy the mounted checkout into the container's own files, and record its state.

    python3 -m workspace.container.restore CHECKOUT COMPILED

Runs in a container of the committed image, from the checkout that is mounted at CHECKOUT; the
volume of files compiled at run time is mounted at COMPILED. Both are copied to where a development
container mounts them, because a commit of a container holds nothing that is mounted.

Copied are the files that git tracks or would, and the fork's trees with their binaries. Their
repositories are cloned: settings, remotes with passwords in their addresses, hooks and reflogs are
left out. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TypedDict

from workspace.fork.tree_state import APPLIED, PATCHES_KEY, VERSION_KEY
from workspace.host.errors import WorkspaceError
from workspace.host.git import git
from workspace.host.git import run as run_git

CHECKOUT = Path("/workspaces/vllm-kernels")
RECORD = Path("/opt/vllm-kernels/snapshot")
COMPILED = Path("/cache/compiled")
LEFT_OUT = {"ccache"}
"""It can be gigabytes, and a snapshot compiles nothing."""


class TreeRecord(TypedDict):
    """The state of a git tree; everything uncommitted is in a diff beside the record."""

    commit: str
    tree: str
    """Git's hash of all files as they are, by which a reconstruction is checked."""
    dirty: bool
    diff_sha256: str


class ForkRecord(TreeRecord):
    """The state of a release's tree in the fork."""

    applied: str
    own_commits: int


class Record(TypedDict):
    """What a snapshot holds."""

    workspace: TreeRecord
    fork: dict[str, ForkRecord]


def clone_repository(source: Path, target: Path) -> None:
    """Clone `source` as `target`/.git, at the same commit; no file is checked out."""
    head = git("rev-parse", "HEAD", tree=source).strip()
    # By its address: such a clone shares no files with the source, which may be shallow.
    git("clone", "-q", "--mirror", f"file://{source}", str(target / ".git"), tree=target)
    git("config", "core.bare", "false", tree=target)
    git("config", "--remove-section", "remote.origin", tree=target)
    branch = git("symbolic-ref", "-q", "HEAD", tree=source, check=False).strip()
    if branch:
        git("symbolic-ref", "HEAD", branch, tree=target)
    else:
        git("update-ref", "--no-deref", "HEAD", head, tree=target)


def copy(source: Path, target: Path, names: list[str]) -> None:
    """Copy files and links with their times: Python's bytecode stays valid."""
    for name in names:
        if (source / name).is_symlink() or (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name, follow_symlinks=False)


def files_as_they_are(tree: Path) -> str:
    """Git's hash of all files of a tree that it tracks or would; the index is not changed."""
    with tempfile.TemporaryDirectory() as work:
        scratch = {"GIT_INDEX_FILE": str(Path(work) / "index")}
        git("read-tree", "HEAD", tree=tree, env=scratch)
        git("add", "-A", tree=tree, env=scratch)
        return git("write-tree", tree=tree, env=scratch).strip()


def record(tree: Path, name: str) -> TreeRecord:
    """The state of a tree; writes its diff to `name`.diff beside the record."""
    files = files_as_they_are(tree)
    options = ("--binary", "--no-ext-diff", "--no-renames")
    diff = run_git("diff", *options, "HEAD", files, tree=tree).stdout
    (RECORD / f"{name}.diff").write_bytes(diff)
    return {
        "commit": git("rev-parse", "HEAD", tree=tree).strip(),
        "tree": files,
        "dirty": bool(diff),
        "diff_sha256": hashlib.sha256(diff).hexdigest(),
    }


def released(tree: Path, version: str) -> str:
    """Lines `md5  path` of the files in a tree of the fork that are as vLLM released them: the
    search for credentials passes over what is in its tests and examples."""
    base = f"upstream/{version}"
    names = git("ls-tree", "-r", "-z", "--name-only", base, tree=tree).split("\0")
    changed = git("diff", "--name-only", "-z", "--no-renames", base, tree=tree).split("\0")
    lines = []
    for path in (tree / name for name in sorted({*names} - {*changed})):
        if not path.is_symlink():
            md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            lines.append(f"{md5}  {path.relative_to('/')}\n")
    return "".join(lines)


def restore_workspace(source: Path) -> TreeRecord:
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", tree=source)
    clone_repository(source, CHECKOUT)
    copy(source, CHECKOUT, [name for name in names.split("\0") if name])
    link = source / "vllm-fork" / "src"
    if link.is_symlink():
        (CHECKOUT / "vllm-fork" / "src").symlink_to(os.readlink(link))
    git("reset", "-q", "--mixed", tree=CHECKOUT)
    return record(CHECKOUT, "workspace")


def restore_fork(source: Path) -> ForkRecord:
    """Copy one tree of the fork, with everything in it, whether git tracks it or not."""
    version = source.name
    target = CHECKOUT / "vllm-fork" / "releases" / version
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
    state = record(target, f"vllm-{version}")
    applied = git("rev-parse", APPLIED, tree=target).strip()
    (RECORD / f"vllm-{version}.md5sums").write_text(released(target, version))
    # Each as a mail, to read and to apply elsewhere.
    mails = ("--stdout", "--binary", f"{applied}..HEAD")
    patches = run_git("format-patch", *mails, tree=target).stdout
    (RECORD / f"vllm-{version}.patches").write_bytes(patches)
    count = git("rev-list", "--count", f"{applied}..HEAD", tree=target).strip()
    return {
        "commit": state["commit"],
        "tree": state["tree"],
        "dirty": state["dirty"],
        "diff_sha256": state["diff_sha256"],
        "applied": applied,
        "own_commits": int(count),
    }


def main(source: Path, compiled: Path) -> None:
    RECORD.mkdir(exist_ok=True)
    for old in RECORD.iterdir():
        old.unlink()
    for old in CHECKOUT.iterdir():  # in a container of a snapshot
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    trees = sorted((source / "vllm-fork" / "releases").glob("[!.]*"))
    state: Record = {
        "workspace": restore_workspace(source),
        "fork": {tree.name: restore_fork(tree) for tree in trees},
    }
    for path in sorted(compiled.iterdir()):
        if path.is_dir() and path.name not in LEFT_OUT:
            shutil.copytree(path, COMPILED / path.name, symlinks=True, dirs_exist_ok=True)
    text = json.dumps(state, indent=2)
    (RECORD / "record.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except WorkspaceError as error:
        sys.exit(str(error))
