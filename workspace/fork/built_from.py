# SPDX-License-Identifier: Apache-2.0
"""The manifest of the compiled files in a release's tree, and the sources they were made from.

Files of the released wheel were made from the pristine release. Files of a local build were made
from the tree as it was when that build began, including edits and new files. That state is kept as
a tree object in the fork's repository, so that git can tell what changed since; no commit is made
and the user's index does not change.
"""

from __future__ import annotations

import contextlib
import tempfile
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel

from workspace.fork.prepare import upstream_tag
from workspace.host.files import write_file
from workspace.host.git import git
from workspace.pins.model import Device
from workspace.pins.release import tree as release_tree

INPUTS = ("CMakeLists.txt", "cmake", "csrc", "tools/build_deepgemm_C.py")
"""The files that upstream's cmake build reads. git ignores those that cmake generates there."""
RUST = ("rust", "rust-toolchain.toml", "tools/build_rust.py")
"""The sources of upstream's Rust parts, which cmake does not build."""
BUILT = "refs/workspace/built"
COMPILED_AGAINST = ("torch", "nvidia-cuda-nvcc", "nvidia-cuda-runtime")
"""Packages whose change makes a compiled library unusable."""
ALL = "all"
"""The name of a build of every target."""


class Build(BaseModel):
    """A local build: the hash of its sources, the packages and GPU architectures it was for."""

    sources: str
    packages: dict[str, str]
    architectures: str
    time: str


class BuiltFile(BaseModel):
    """A file of a local build: its CRC-32, and the name of the build."""

    crc: int | None
    build: str


class Manifest(BaseModel):
    """The compiled files of a tree: those of a wheel with their CRC-32, and those built locally."""

    wheel: str = ""
    sha256: str = ""
    device: Device | None = None
    files: dict[str, int] = {}
    own: dict[str, BuiltFile] = {}
    builds: dict[str, Build] = {}
    unfinished: bool = False

    def names(self) -> set[str]:
        return self.files.keys() | self.own.keys()


def manifest_path() -> Path:
    return release_tree() / ".git" / "workspace-binaries.json"


def read_manifest() -> Manifest:
    """The manifest of the selected release's tree, empty if there are no compiled files."""
    path = manifest_path()
    return Manifest.model_validate_json(path.read_text()) if path.exists() else Manifest()


def write_manifest(manifest: Manifest) -> None:
    write_file(manifest_path(), manifest.model_dump_json().encode())


def _snapshot(tree: Path, env: dict[str, str]) -> str:
    """The tree object of the current sources, committed or not."""
    git("read-tree", "HEAD", tree=tree, env=env)
    tracked = git("ls-tree", "-z", "--name-only", "HEAD", *INPUTS, *RUST, tree=tree, env=env)
    existing = [name for name in (*INPUTS, *RUST) if (tree / name).exists()]
    names = {*tracked.split("\0"), *existing} - {""}
    git("add", "-A", "--", *sorted(names), tree=tree, env=env)
    return git("write-tree", tree=tree, env=env).strip()


def record(tree: Path) -> str:
    """Keep the current sources in the fork's repository, under a ref; returns their hash."""
    with tempfile.TemporaryDirectory() as work:
        sources = _snapshot(tree, {"GIT_INDEX_FILE": f"{work}/index"})
    git("update-ref", f"{BUILT}/{sources}", sources, tree=tree)
    return sources


def remove_unused(tree: Path, manifest: Manifest) -> None:
    """Remove the refs of sources that no build in the manifest was made from."""
    used = {build.sources for build in manifest.builds.values()}
    for ref in git("for-each-ref", "--format=%(refname)", BUILT, tree=tree).split():
        if ref.rpartition("/")[2] not in used:
            git("update-ref", "-d", ref, tree=tree)


def stale(tree: Path, version: str, manifest: Manifest) -> tuple[list[str], list[str]]:
    """Sources from which the binaries in the tree were not made: cmake's, and Rust's.

    A file is up to date if some build was made from its current content. If a local build was made
    from an edit of it, that edit must be the current one: undoing an edit is an edit, too.
    """
    release = f"{upstream_tag(version)}^{{tree}}"
    with tempfile.TemporaryDirectory() as work:
        # Temporary index and object store, so that the repository does not change.
        env = {
            "GIT_INDEX_FILE": f"{work}/index",
            "GIT_OBJECT_DIRECTORY": work,
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(tree / ".git" / "objects"),
        }
        now = _snapshot(tree, env)

        def differing(before: str, after: str, paths: tuple[str, ...]) -> set[str]:
            command = ("diff-tree", "-r", "-z", "--name-only", "--no-renames", before, after, "--")
            return set(git(*command, *paths, tree=tree, env=env).split("\0")) - {""}

        rust = differing(release, now, RUST)
        in_all_builds = [] if ALL in manifest.builds else [differing(release, now, INPUTS)]
        outdated: set[str] = set()
        for build in manifest.builds.values():
            changed = differing(build.sources, now, INPUTS)
            in_all_builds.append(changed)
            outdated |= changed & differing(release, build.sources, INPUTS)
    return sorted(set.intersection(*in_all_builds) | outdated), sorted(rust)


def packages() -> dict[str, str]:
    """The installed versions of the packages that libraries are compiled against."""
    versions = {}
    for name in COMPILED_AGAINST:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def other_packages(manifest: Manifest) -> dict[str, str]:
    """Build → the packages that have another version now than when it was compiled."""
    now = packages()
    changed = {
        name: ", ".join(
            f"{package} {version} (now {now.get(package, 'missing')})"
            for package, version in build.packages.items()
            if now.get(package) != version
        )
        for name, build in manifest.builds.items()
    }
    return {name: text for name, text in changed.items() if text}
