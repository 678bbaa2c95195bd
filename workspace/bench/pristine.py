# SPDX-License-Identifier: Apache-2.0
"""BASELINE=pristine: the fork with its switch unset against the release without the patches; and
ENGINE=released: both variants in that release, where our plugin puts the hook in.

The release's Python files come from its tag in the fork's git and are unpacked under .workspace;
the compiled files, which git does not track, are linked in from the fork, or are the released
wheel's where the fork has some of a local build. The variants then differ in nothing but the
patches and what was compiled here.
"""

import shutil
import subprocess
from collections.abc import Container
from dataclasses import replace
from pathlib import Path

from workspace.bench.plan import Plan
from workspace.bench.variants import Variant
from workspace.fork import install
from workspace.fork.built_from import read_manifest
from workspace.fork.prepare import upstream_tag
from workspace.host.errors import WorkspaceError
from workspace.host.git import git
from workspace.host.git import run as run_git
from workspace.host.paths import STATE
from workspace.pins import release
from workspace.pins.model import load

TREE = STATE / "pristine"
IGNORED = ("ls-files", "--others", "--ignored", "--exclude-standard", "-z")
"""Files that git ignores come from the installation; a user's new file is not ignored."""


def variants(plan: Plan) -> tuple[Variant, Variant]:
    """(pristine, stock): neither launches custom kernels.

    Raises:
        WorkspaceError: the release in the fork's git is not the pinned one, or cannot be written.
    """
    return Variant("pristine", python_path=released_tree()), Variant("stock")


def released(variants: tuple[Variant, Variant]) -> tuple[Variant, Variant]:
    """Both variants in the release without the patches. Raises as `variants` does."""
    tree = released_tree()
    first, second = (replace(variant, python_path=tree) for variant in variants)
    return first, second


def released_tree() -> Path:
    """The release without the patches, with its own binaries. Raises as `variants` does."""
    version = release.selected()
    tag, pinned, manifest = upstream_tag(version), load().release(version).tree, read_manifest()
    place = TREE / tag.replace("/", "-")
    tree = make_tree(release.tree(version), place, tag, pinned, without=manifest.own)
    install.extract_replaced(manifest, tree)
    return tree


def make_tree(
    source: Path, tree: Path, tag: str, pinned: str, without: Container[str] = ()
) -> Path:
    """The release's files at `tree`, with the fork's untracked binaries linked in.

    Args:
        source: the fork's tree.
        tag: the release's tag.
        pinned: hash of the release's git tree; empty if none is pinned.
        without: binaries that are left out.

    Raises:
        WorkspaceError: git cannot write the tree, or it is not the pinned one.
    """
    tagged = git("rev-parse", "-q", "--verify", f"{tag}^{{tree}}", tree=source, check=False).strip()
    if not tagged:
        raise WorkspaceError(f"{source} has no tag {tag}; run make dev")
    if pinned and tagged != pinned:
        raise WorkspaceError(
            f"{tag} in {source} is tree {tagged[:12]}, pinned is {pinned[:12]}, "
            "so it is not the release; restore the tag, or move your work away and run make dev"
        )
    partial = tree.with_name(f"{tree.name}.partial")
    for folder in (tree, partial):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    # An archive, not `git worktree`, which would leave entries in the user's repository.
    archive = run_git("archive", tag, "vllm", tree=source).stdout
    unpacked = subprocess.run(["tar", "-x", "-C", str(partial)], input=archive, check=False)
    if unpacked.returncode != 0:
        raise WorkspaceError(
            f"cannot unpack {tag} into {partial} (tar's message is above); free "
            "some space there and re-run"
        )
    for name in git(*IGNORED, "vllm", tree=source).split("\0"):
        if name and not name.endswith(".pyc") and name not in without:
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source / name)
    partial.rename(tree)
    return tree
