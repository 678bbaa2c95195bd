# SPDX-License-Identifier: Apache-2.0
"""Which sources the compiled files in a release's tree were made from.

Those of the released wheel: from the pristine release. Those of a build of one's own: from the
tree as it was when that build began, edits and new files included. Such a state is kept as a tree
object in the fork's repository, so that git can say what changed since; no commit is made and the
user's index is not touched.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from workspace.fork.prepare import upstream_tag
from workspace.host.git import git

INPUTS = ("CMakeLists.txt", "cmake", "csrc", "tools/build_deepgemm_C.py")
"""What upstream's cmake build reads of the tree. What cmake generates there, git ignores."""
RUST = ("rust", "rust-toolchain.toml", "tools/build_rust.py")
"""What upstream's Rust parts are made from; cmake does not build them."""
BUILT = "refs/workspace/built"
COMPILED_AGAINST = ("torch", "nvidia-cuda-nvcc", "nvidia-cuda-runtime")
"""Packages that a library must be compiled anew for."""
ALL = "all"
"""The name of a build of every target."""

Manifest = dict[str, Any]


@contextlib.contextmanager
def _apart(place: Path) -> Iterator[dict[str, str]]:
    """An index and an object store of its own, so that looking changes nothing."""
    with tempfile.TemporaryDirectory() as work:
        yield {
            "GIT_INDEX_FILE": f"{work}/index",
            "GIT_OBJECT_DIRECTORY": work,
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(place / ".git" / "objects"),
        }


def _snapshot(place: Path, env: dict[str, str]) -> str:
    """The tree object of the sources as they lie there, committed or not."""
    git("read-tree", "HEAD", tree=place, env=env)
    tracked = git("ls-tree", "-z", "--name-only", "HEAD", *INPUTS, *RUST, tree=place, env=env)
    there = [name for name in (*INPUTS, *RUST) if (place / name).exists()]
    names = {*tracked.split("\0"), *there} - {""}
    git("add", "-A", "--", *sorted(names), tree=place, env=env)
    return git("write-tree", tree=place, env=env).strip()


def record(place: Path) -> str:
    """Keep the present state of the sources in the fork's repository, under a ref."""
    with tempfile.TemporaryDirectory() as work:
        tree = _snapshot(place, {"GIT_INDEX_FILE": f"{work}/index"})
    git("update-ref", f"{BUILT}/{tree}", tree, tree=place)
    return tree


def forget(place: Path, manifest: Manifest) -> None:
    """Drop the states that no build in the manifest is made from."""
    kept = {build["sources"] for build in manifest.get("builds", {}).values()}
    for ref in git("for-each-ref", "--format=%(refname)", BUILT, tree=place).split():
        if ref.rpartition("/")[2] not in kept:
            git("update-ref", "-d", ref, tree=place)


def stale(place: Path, version: str, manifest: Manifest) -> tuple[list[str], list[str]]:
    """Sources that the binaries in the tree were not made from: cmake's, and Rust's.

    A file is up to date when some build has it as it is now. Where a build of one's own has an
    edit of it, that edit must be the present one: an edit taken back is an edit, too.
    """
    builds = manifest.get("builds", {})
    release = f"{upstream_tag(version)}^{{tree}}"
    with _apart(place) as env:
        now = _snapshot(place, env)

        def differing(before: str, after: str, paths: tuple[str, ...]) -> set[str]:
            command = ("diff-tree", "-r", "-z", "--name-only", "--no-renames", before, after, "--")
            return set(git(*command, *paths, tree=place, env=env).split("\0")) - {""}

        rust = differing(release, now, RUST)
        everywhere = [] if ALL in builds else [differing(release, now, INPUTS)]
        outdated: set[str] = set()
        for build in builds.values():
            changed = differing(build["sources"], now, INPUTS)
            everywhere.append(changed)
            outdated |= changed & differing(release, build["sources"], INPUTS)
    return sorted(set.intersection(*everywhere) | outdated), sorted(rust)


def packages() -> dict[str, str]:
    """The installed versions of what libraries are compiled against."""
    found = {}
    for name in COMPILED_AGAINST:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def other_packages(manifest: Manifest) -> dict[str, str]:
    """Build → what it was compiled against and the environment no longer has."""
    now = packages()
    found = {}
    for name, build in manifest.get("builds", {}).items():
        wrong = [
            f"{package} {version} (now {now.get(package, 'missing')})"
            for package, version in build["packages"].items()
            if now.get(package) != version
        ]
        if wrong:
            found[name] = ", ".join(wrong)
    return found
