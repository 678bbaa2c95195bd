# SPDX-License-Identifier: Apache-2.0
"""The tree of a release: the pinned release with our patches as commits on it.

Steps: fetch the sdist, verify it, unpack it, commit it as the pristine release, commit the
patches on top. All of that happens beside the place; one rename puts it there. A tree that is
there already is only ever changed when it holds nothing but what we put into it.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from workspace.fork import patch_queue
from workspace.fork.patch_queue import identity
from workspace.fork.tree_state import APPLIED, PATCHES_KEY, VERSION_KEY, ForkState, shown, state
from workspace.host.errors import WorkspaceError
from workspace.host.files import new_folder, remove_partial
from workspace.host.git import git
from workspace.host.paths import PATCHES
from workspace.host.text import plural, say
from workspace.pins import release
from workspace.pins.model import Release, load

# Written by setup.py or by the packing of the sdist, and so no part of the pristine release.
GENERATED = ("PKG-INFO", "vllm.egg-info", "vllm/_version.py")
EPOCH = "2000-01-01T00:00:00+00:00"
"""The pristine commit's date: fixed, so that the same release is the same commit everywhere."""
REPLACED = "refs/workspace/replaced"
"""Commits that a renewed queue of patches took the place of; nothing that was ever exported is out
of reach."""


QUEUE = "refs/workspace/queue"
"""What the patches make, where that could not be checked out for the user's work."""


def upstream_tag(version: str) -> str:
    return f"upstream/{version}"


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack the sdist into `folder`; returns the one folder that is in it."""
    # Python's tarfile takes five times as long, and Debian 12's lacks the filters.
    command = ["tar", "-xzf", str(sdist), "-C", str(folder), "--no-same-owner"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[0].removeprefix("tar: ")
        # Its content has the pinned hash, so what is wrong is the place, mostly a full disk.
        raise WorkspaceError(f"{sdist.name} cannot be unpacked into {folder}: {reason}")
    (tree,) = folder.iterdir()
    return tree


def commit_pristine(tree: Path, version: str, wanted: str) -> str:
    """Make the unpacked release a repository whose one commit is the tagged release; its tree.

    Raises:
        WorkspaceError: the tree is not the one `wanted`, which is empty where none is pinned.
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


def _move_to(tree: Path, tip: str, digest: str) -> None:
    """Check out the commit of the last patch. git refuses where a changed file is in the way."""
    git("reset", "-q", "--keep", tip, tree=tree)
    record(tree, tip, digest)


def record(tree: Path, tip: str, digest: str) -> None:
    """Write down that the patches with this digest make the commit `tip`. What they made before
    stays in reach where it is not a part of that."""
    before = git("rev-parse", "-q", "--verify", APPLIED, tree=tree, check=False).strip()
    if before and git("merge-base", before, tip, tree=tree, check=False).strip() != before:
        git("update-ref", f"{REPLACED}/{before[:12]}", before, tree=tree)
    git("update-ref", APPLIED, tip, tree=tree)
    git("config", PATCHES_KEY, digest, tree=tree)


def create(version: str, sdist: Path, wanted: str, patches: list[Path]) -> str:
    """Build a release's tree beside its place and rename it when it is whole.

    Returns the git tree of the pristine release, which must be `wanted` if that is not empty.
    """
    place = release.tree(version)
    remove_partial(place.parent)
    say(f"unpacking vLLM {version}, applying {plural(len(patches), 'patch')}")
    with new_folder(place) as work:
        tree = unpack(sdist, work)
        found = commit_pristine(tree, version, wanted)
        tip = patch_queue.commit_files(tree, upstream_tag(version), patches)
        _move_to(tree, tip, patch_queue.digest(patches))
        for entry in tree.iterdir():
            entry.rename(work / entry.name)
        tree.rmdir()
    return found


def reapply(found: ForkState, version: str, patches: list[Path]) -> None:
    """Our patches changed: put the new ones in place of the old where nobody's work is on them."""
    tree = release.tree(version)
    where = f"{PATCHES.parent.name}/patches/{version}"
    tip = patch_queue.commit_files(tree, upstream_tag(version), patches)
    if found.head == tip:  # checked out already, by a run that was killed before it wrote that down
        record(tree, tip, patch_queue.digest(patches))
        return
    if found.own_work:
        git("update-ref", QUEUE, tip, tree=tree)
        say(
            f"{where} changed, but {shown(tree)} holds work of yours "
            f"({len(found.uncommitted)} uncommitted, {plural(len(found.own_commits), 'commit')}): "
            f"left as it is. To have both: git rebase --onto {QUEUE} {APPLIED} there, then "
            "make fork-export"
        )
        return
    _move_to(tree, tip, patch_queue.digest(patches))
    before = f"{REPLACED}/{found.applied[:12]}"
    say(f"patches changed: {shown(tree)} has {len(patches)} now; what it had before is at {before}")


def ensure() -> ForkState:
    """The selected release's tree, made if it is missing, its patches renewed if they changed."""
    version = release.selected()
    pinned: Release = load().release(version)
    patches = patch_queue.files(version)
    adopt_older_layout()
    found = state()
    if found is None:
        # Imported late: a run with nothing to do would take twice as long.
        from workspace.environment.fetch import fetch

        create(version, fetch(pinned.sdist), pinned.tree, patches)
    elif found.patches_digest != patch_queue.digest(patches):
        reapply(found, version, patches)
    if release.active() is None and version == load().vllm.default:
        release.activate(version)
    made = state()
    if made is None:
        raise WorkspaceError(f"{release.tree()} vanished while it was made; run: make dev")
    return made


def adopt_older_layout() -> None:
    """A checkout from before there were several releases has its one tree at vllm-fork/src."""
    place = release.link()
    if place.is_symlink() or not place.exists():
        return
    found = state(place)
    if found is not None:
        release.adopt(found.version)
