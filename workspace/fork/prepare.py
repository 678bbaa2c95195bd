# SPDX-License-Identifier: Apache-2.0
"""The tree of a release: the pinned release with our patches as commits on top.

Steps: fetch the sdist, verify it, unpack it, commit it as the pristine release, commit the patches,
all in a temporary folder, which is then renamed. An existing tree is changed only if there is no
work of the user in it.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from workspace.fork import patch_queue
from workspace.fork.patch_queue import identity, is_ancestor
from workspace.fork.tree_state import (
    APPLIED,
    PATCHES_KEY,
    VERSION_KEY,
    ForkState,
    require,
    shown,
    state,
)
from workspace.host.errors import WorkspaceError
from workspace.host.files import new_folder, remove_partial
from workspace.host.git import git
from workspace.host.text import plural, say
from workspace.pins import release
from workspace.pins.model import load

GENERATED = ("PKG-INFO", "vllm.egg-info", "vllm/_version.py")
"""Written by setup.py or by packing the sdist, so not part of the pristine release."""
EPOCH = "2000-01-01T00:00:00+00:00"
"""Date of the pristine commit: fixed, so that the same release is the same commit everywhere."""
REPLACED = "refs/workspace/replaced"
"""Commits that changed patches replaced, so that everything that was exported stays reachable."""
QUEUE = "refs/workspace/queue"
"""The commit of the patches, if it was not checked out because of the user's work."""


def upstream_tag(version: str) -> str:
    return f"upstream/{version}"


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack the sdist into `folder`; returns the single folder in it."""
    # Python's tarfile takes five times as long, and Debian 12's lacks the filters.
    command = ["tar", "-xzf", str(sdist), "-C", str(folder), "--no-same-owner"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = result.stderr.strip().partition("\n")[0].removeprefix("tar: ")
        # The sdist has the pinned hash, so the cause is the folder, usually a full disk.
        raise WorkspaceError(
            f"{sdist.name} cannot be unpacked into {folder}: {reason}; free some space there and "
            "re-run"
        )
    (tree,) = folder.iterdir()
    return tree


def commit_pristine(tree: Path, version: str, wanted: str) -> str:
    """Make the unpacked release a repository with one commit, the tagged release.

    Returns:
        The hash of git's tree, which must be `wanted` unless that is empty.

    Raises:
        WorkspaceError: it has another hash.
    """
    git("init", "-q", "--template=", "--initial-branch=main", ".", tree=tree)
    for name in GENERATED:
        path = tree / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    # With this threshold git writes one pack, not 4,000 files: twice as fast.
    git("-c", "core.bigFileThreshold=1", "add", "--all", "--force", ".", tree=tree)
    found = git("write-tree", tree=tree).strip()
    if wanted and found != wanted:
        raise WorkspaceError(
            f"the unpacked vLLM {version} is tree {found[:12]}, pinned is {wanted[:12]}; "
            "check pins.toml"
        )
    git(
        "commit", "-q", "-m", f"vLLM {version}, as released",
        tree=tree, env=identity("vLLM contributors", "vllm@upstream.invalid", EPOCH),
    )  # fmt: skip
    git("tag", upstream_tag(version), tree=tree)
    git("update-ref", APPLIED, "HEAD", tree=tree)
    git("config", VERSION_KEY, version, tree=tree)
    return found


def record(tree: Path, tip: str, digest: str) -> None:
    """Record that the patches with this digest are applied up to the commit `tip`. The commit that
    was recorded before stays reachable."""
    before = git("rev-parse", "-q", "--verify", APPLIED, tree=tree, check=False).strip()
    if before and not is_ancestor(tree, before, tip):
        git("update-ref", f"{REPLACED}/{before[:12]}", before, tree=tree)
    git("update-ref", APPLIED, tip, tree=tree)
    git("config", PATCHES_KEY, digest, tree=tree)


def _check_out(tree: Path, tip: str, digest: str) -> None:
    """Check out the commit of the last patch; git refuses if that would overwrite an edit."""
    git("reset", "-q", "--keep", tip, tree=tree)
    record(tree, tip, digest)


def create(version: str, sdist: Path, wanted: str, patches: list[Path]) -> str:
    """Create the tree of a release in a temporary folder and rename it when it is complete; see
    `commit_pristine`."""
    folder = release.tree(version)
    remove_partial(folder.parent)
    say(f"unpacking vLLM {version}, applying {plural(len(patches), 'patch')}")
    with new_folder(folder) as work:
        tree = unpack(sdist, work)
        pristine = commit_pristine(tree, version, wanted)
        tip = patch_queue.commit_files(tree, upstream_tag(version), patches)
        _check_out(tree, tip, patch_queue.digest(patches))
        for entry in tree.iterdir():
            entry.rename(work / entry.name)
        tree.rmdir()
    return pristine


def reapply(before: ForkState, version: str, patches: list[Path]) -> None:
    """Replace the applied patches by the new ones, unless there is work of the user in the tree."""
    tree, digest = release.tree(version), patch_queue.digest(patches)
    tip = patch_queue.commit_files(tree, upstream_tag(version), patches)
    if before.head == tip:  # checked out by a run that was killed before it recorded that
        record(tree, tip, digest)
    elif before.own_work:
        git("update-ref", QUEUE, tip, tree=tree)
        commits = plural(len(before.own_commits), "commit")
        say(
            f"vllm-fork/patches/{version} changed, but {shown(tree)} holds work of yours "
            f"({len(before.uncommitted)} uncommitted, {commits}) and stays unchanged. To have "
            f"both, run there: git rebase --onto {QUEUE} {APPLIED}, then make fork-export"
        )
    else:
        _check_out(tree, tip, digest)
        replaced = f"{REPLACED}/{before.applied[:12]}"
        say(f"patches changed: {shown(tree)} has {len(patches)} now; the old ones: {replaced}")


def ensure() -> ForkState:
    """The state of the selected release's tree, which is created if missing and gets our patches
    if they changed."""
    version = release.selected()
    pinned = load().release(version)
    patches = patch_queue.files(version)
    _move_older_layout()
    current = state()
    if current is None:
        # Imported here: a run with nothing to do would take twice as long.
        from workspace.environment.fetch import fetch

        create(version, fetch(pinned.sdist), pinned.tree, patches)
    elif current.patches_digest != patch_queue.digest(patches):
        reapply(current, version, patches)
    if release.active() is None and version == load().vllm.default:
        release.activate(version)
    return require()


def _move_older_layout() -> None:
    """Move the tree of an older checkout, which is vllm-fork/src itself, to its release."""
    old = None if release.link().is_symlink() else state(release.link())
    if old and not release.tree(old.version).exists():
        release.tree(old.version).parent.mkdir(exist_ok=True)
        release.link().rename(release.tree(old.version))
        release.activate(old.version)
