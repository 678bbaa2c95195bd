# SPDX-License-Identifier: Apache-2.0
"""`make unbundle`: move the contents of a bundle to where `ENV=system` looks for them.

The fork's tree goes to vllm-fork/releases, pinned files to the cache of `make dev`, packages beside
the environment (`ENV=system` installs them into its own overlay, never into the host's Python).
Then `make dev` does what it does everywhere. Everything is unpacked beside its destination and
renamed, the packages with the manifest last: with them the bundle is complete, and a second run
changes nothing.

Standard library only: this runs before the environment exists.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from workspace import verbs
from workspace.bundle import repository, unbundle
from workspace.fork.tree_state import shown, state
from workspace.host import settings
from workspace.host.errors import WorkspaceError
from workspace.host.files import PARTIAL, remove_partial
from workspace.host.git import git
from workspace.host.paths import FORK, HEADERS, ROOT, STATE, cache_folder
from workspace.host.text import plural, say, some
from workspace.pins import release


def run(options: verbs.Unbundle) -> settings.Settings:
    """Unpack the bundle in the folder FROM=; returns the settings for the `make dev` after it.

    Raises:
        WorkspaceError: no bundle, parts missing or damaged, another machine, or the user's work in
            the way. Nothing has changed then.
    """
    if not options.source:
        raise WorkspaceError("name the folder with the parts: make unbundle FROM=<folder>")
    folder = Path(options.source).expanduser().absolute()
    try:
        manifest = unbundle.read_manifest(folder)
        unbundle.require_machine(manifest)
        python = _python(manifest)
        version = manifest["pins"]["vllm"]
        release.require_pinned(version)
        packages = release.bundled(version)
        if _identity(packages) == manifest["identity"]:
            say(f"bundle {manifest['identity']} is unpacked already; nothing was changed")
        else:
            say(f"checking {plural(len(manifest['parts']), 'part')} of {manifest['name']}")
            unbundle.check_parts(folder, manifest)
            _unpack(folder, manifest, version, packages)
    except unbundle.UnbundleError as error:
        raise WorkspaceError(str(error)) from None
    return settings.Settings("system", manifest["device"], python, version)


def _identity(packages: Path) -> str | None:
    """The bundle that these packages came with."""
    try:
        return json.loads((packages / unbundle.MANIFEST).read_bytes())["identity"]
    except (OSError, ValueError, KeyError):
        return None


def _python(manifest: dict[str, Any]) -> str:
    """PYTHON= if given, else the inventory's, else the one that runs this.

    Raises:
        WorkspaceError: it is of another version, for which the bundle has no packages.
    """
    from workspace.environment.python import version_of

    target = manifest["target"]["python"]
    listed = target["executable"]
    fallback = listed if os.access(listed, os.X_OK) else sys.executable
    python = settings.current().python or fallback
    version = version_of(python)
    if version != target["short"]:
        raise WorkspaceError(
            f"{python} is Python {version or 'of an unknown version'}, the bundle is for "
            f"{target['short']} ({listed}); use that one: PYTHON=<path>"
        )
    return python


def _unpack(source: Path, manifest: dict[str, Any], version: str, packages: Path) -> None:
    for folder in (STATE, FORK / "releases"):
        remove_partial(folder)  # of a run that was killed; this one holds the lock
    with tempfile.TemporaryDirectory(dir=STATE, prefix=PARTIAL) as name:
        work = Path(name)
        say("unpacking")
        unbundle.extract(source, manifest, work)
        _require_same_checkout(work, source)
        _place_fork(work / unbundle.FORK, version)
        for path in sorted((work / "cache").glob("*")):
            _into_cache(path, manifest["cache"][path.name])
        for archive in sorted((work / "headers").glob("*.zip")):
            _place_headers(archive)
        shutil.copy(source / unbundle.MANIFEST, work / "packages" / unbundle.MANIFEST)
        _replace(work / "packages", packages)
    say(f"unpacked bundle {manifest['identity']}: {manifest['summary']}")


def _require_same_checkout(work: Path, source: Path) -> None:
    """Raise unless this checkout's files are the bundle's. They are not touched."""
    theirs = work / unbundle.OWN
    elsewhere = f"python3 {shlex.quote(str(source / 'unbundle.py'))} <another folder>"
    wanted = repository.content(unbundle.WORKTREE, theirs)
    if not (ROOT / ".git").exists():
        raise WorkspaceError(
            f"{ROOT} is not a git repository, so its files cannot be compared with the bundle's; "
            f"unpack beside it: {elsewhere}"
        )
    bare = work / "here.git"
    found = repository.content(repository.snapshot(ROOT, bare), bare)
    if found == wanted:
        return
    # Both trees in one repository, to name the files that differ.
    (bare / "objects" / "info" / "alternates").open("a").write(f"{theirs / 'objects'}\n")
    names = git("diff-tree", "-r", "--name-only", found, wanted, tree=bare).splitlines()
    raise WorkspaceError(
        f"this checkout is not the one that the bundle was packed from: {some(names)} "
        f"{'differs' if len(names) == 1 else 'differ'}; it was not changed. Unpack beside it: "
        f"{elsewhere}"
    )


def _place_fork(bare: Path, version: str) -> None:
    """Unpack the fork's tree; it replaces an existing one only if nothing of that is lost.

    Raises:
        WorkspaceError: the existing one holds work that the bundle's lacks.
    """
    path = release.tree(version)
    existing = state(path)
    if existing is not None and _same(path, bare):
        return
    if existing is not None and existing.own_work:
        raise WorkspaceError(
            f"{shown(path)} holds work of yours ({some(existing.own_work)}) that the bundle's tree "
            f"lacks; move it away (mv {shown(path)} {shown(path)}-mine) and re-run"
        )
    commits = git("rev-list", "--count", "HEAD", "--not", "--tags=upstream/*", tree=bare)
    say(f"unpacking vLLM {version} with {plural(int(commits), 'commit')} on top")
    path.parent.mkdir(exist_ok=True)
    fresh = path.parent / f"{PARTIAL}bundle-{version}"
    unbundle.restore(bare, fresh)
    _replace(fresh, path)


def _same(tree: Path, bare: Path) -> bool:
    """Whether a tree has the bundle's branches, tags and files."""

    def refs(repository: Path) -> set[str]:
        listing = git("for-each-ref", "--format=%(objectname) %(refname)", tree=repository)
        return {line for line in listing.splitlines() if not line.endswith(unbundle.WORKTREE)}

    with tempfile.TemporaryDirectory(dir=STATE, prefix=PARTIAL) as name:
        here = Path(name) / "here.git"
        files = repository.content(repository.snapshot(tree, here), here)
    return files == repository.content(unbundle.WORKTREE, bare) and refs(tree) == refs(bare)


def _into_cache(path: Path, sha256: str) -> None:
    """Move a pinned file to where `fetch` looks; the cache may be on another file system."""
    folder = cache_folder(sha256)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"partial-{path.name}"
    shutil.move(path, partial)
    partial.replace(folder / path.name)


def _place_headers(archive: Path) -> None:
    with zipfile.ZipFile(archive) as content, tempfile.TemporaryDirectory(dir=STATE) as name:
        content.extractall(name)
        _replace(Path(name) / archive.stem, HEADERS / archive.stem)


def _replace(fresh: Path, path: Path) -> None:
    """Rename a folder to `path`, and remove what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.with_name(f"{PARTIAL}{path.name}")
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    shutil.rmtree(old, ignore_errors=True)
