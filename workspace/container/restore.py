# SPDX-License-Identifier: Apache-2.0
"""Put the mounted checkout into a container's own files, and say what it was.

    python3 restore.py CHECKOUT COMPILED

Runs in a container of the committed image, where the checkout is mounted at CHECKOUT and the
volume with what was compiled at run time at COMPILED. Both end up where the mounts were, so that
the image runs without them. A commit of a container holds nothing that is mounted.

Taken along are the files that git tracks or would, and the trees of the fork with their binaries.
Their repositories are cloned: settings, remotes with passwords in their addresses, hooks and
reflogs stay behind. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PLACE = Path("/workspaces/vllm-kernels")
RECORD = Path("/opt/vllm-kernels/snapshot")
COMPILED = Path("/cache/compiled")
NEVER = {"ccache"}
"""Speeds a compilation up, and can be gigabytes: a snapshot compiles nothing."""
MARKS = ("workspace.version", "workspace.patches")
"""The settings of a tree that `make dev` made."""


def git(*arguments: str, tree: Path, **variables: str) -> str:
    command = ["git", "-c", "safe.directory=*", "-c", "core.hooksPath=/dev/null", *arguments]
    result = subprocess.run(
        command, cwd=tree, env={**os.environ, **variables}, capture_output=True, check=False
    )
    if result.returncode:
        words = result.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        sys.exit(f"git {arguments[0]} in {tree}: {words[-1]}")
    return result.stdout.decode(errors="surrogateescape")


def clone_repository(source: Path, target: Path) -> None:
    """The history of `source` as `target`/.git, on the same commit; no file is checked out."""
    head = git("rev-parse", "HEAD", tree=source).strip()
    # By its address: a clone that shares nothing with the source, and may be as shallow.
    git("clone", "-q", "--mirror", f"file://{source}", str(target / ".git"), tree=target)
    git("config", "core.bare", "false", tree=target)
    git("config", "--remove-section", "remote.origin", tree=target)
    branch = subprocess.run(
        ["git", "-c", "safe.directory=*", "symbolic-ref", "-q", "HEAD"],
        cwd=source, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
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


def record(tree: Path, name: str) -> dict[str, Any]:
    """What this tree is: its commit, and all that differs from it as a diff beside the record.

    `tree` is git's name of all the files as they are, so that whoever makes the state again knows
    that it is the same.
    """
    with tempfile.TemporaryDirectory() as work:
        scratch = {"GIT_INDEX_FILE": str(Path(work) / "index")}
        git("read-tree", "HEAD", tree=tree, **scratch)
        git("add", "-A", tree=tree, **scratch)
        files = git("write-tree", tree=tree, **scratch).strip()
    diff = git("diff", "--binary", "--no-ext-diff", "--no-renames", "HEAD", files, tree=tree)
    content = diff.encode(errors="surrogateescape")
    (RECORD / f"{name}.diff").write_bytes(content)
    return {
        "commit": git("rev-parse", "HEAD", tree=tree).strip(),
        "tree": files,
        "dirty": bool(content),
        "diff_sha256": hashlib.sha256(content).hexdigest(),
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
    for mark in MARKS:
        git("config", mark, git("config", mark, tree=source).strip(), tree=target)
    inside = [path for path in (source / ".git").glob("workspace-*") if path.is_file()]
    for path in (*inside, source / ".git" / "info" / "exclude"):
        (target / ".git" / path.relative_to(source / ".git")).parent.mkdir(exist_ok=True)
        shutil.copy2(path, target / ".git" / path.relative_to(source / ".git"))
    git("reset", "-q", "--mixed", tree=target)
    found = record(target, f"vllm-{version}")
    applied = git("rev-parse", "refs/workspace/applied", tree=target).strip()
    # Each as a mail, to read and to apply elsewhere.
    own = git("format-patch", "--stdout", "--binary", f"{applied}..HEAD", tree=target)
    (RECORD / f"vllm-{version}.patches").write_bytes(own.encode(errors="surrogateescape"))
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
    main(Path(sys.argv[1]), Path(sys.argv[2]))
