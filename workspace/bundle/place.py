# SPDX-License-Identifier: Apache-2.0
"""`make unbundle`: put what a bundle holds into this checkout, so that `ENV=system` finds it.

The fork's tree goes to its place, pinned files into the cache where `make dev` looks for them,
packages beside the environment (`ENV=system` installs them into its own overlay, never into the
host's Python). Then `make dev` does what it does everywhere. Everything is unpacked beside its
place and renamed, the packages with the manifest last: once they are there the bundle is placed,
and a second run leaves all as it is.

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
    """Place the bundle in the folder FROM=; returns the settings for the `make dev` after it.

    Raises:
        WorkspaceError: no bundle, parts missing or damaged, another machine, or work of the user's
            in the way. Nothing was placed then.
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
        place = release.bundled(version)
        if _identity(place) == manifest["identity"]:
            say(f"bundle {manifest['identity']} is placed already; your work is left as it is")
        else:
            say(f"checking {plural(len(manifest['parts']), 'part')} of {manifest['name']}")
            unbundle.check_parts(folder, manifest)
            _place(folder, manifest, version, place)
    except unbundle.UnbundleError as error:
        raise WorkspaceError(str(error)) from None
    return settings.Settings("system", manifest["device"], python, version)


def _identity(place: Path) -> str | None:
    try:
        return json.loads((place / unbundle.MANIFEST).read_bytes())["identity"]
    except (OSError, ValueError, KeyError):
        return None


def _python(manifest: dict) -> str:
    """PYTHON= if given, else the one of the inventory, else the one that runs this.

    Raises:
        WorkspaceError: it is of another version, so that the bundle's packages do not fit.
    """
    from workspace.environment.python import version_of

    target = manifest["target"]["python"]
    asked, there = settings.current().python, target["executable"]
    python = asked or (there if os.access(there, os.X_OK) else sys.executable)
    found = version_of(python)
    if found != target["short"]:
        raise WorkspaceError(
            f"{python} is Python {found or 'of an unknown version'}, the bundle is for "
            f"{target['short']} ({there}); give that one: PYTHON=<path>"
        )
    return python


def _place(source: Path, manifest: dict, version: str, place: Path) -> None:
    for folder in (STATE, FORK / "releases"):
        remove_partial(folder)  # of a run that was killed; we hold the lock
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
        packages = work / "packages"
        shutil.copy(source / unbundle.MANIFEST, packages / unbundle.MANIFEST)
        _replace(packages, place)
    say(f"placed bundle {manifest['identity']}: {manifest['summary']}")


def _require_same_checkout(work: Path, source: Path) -> None:
    """Raise unless this checkout's files are the bundle's. They are not touched."""
    theirs = work / unbundle.OWN
    beside = f"python3 {shlex.quote(str(source / 'unbundle.py'))} <another folder>"
    wanted = git("rev-parse", f"{unbundle.WORKTREE}^{{tree}}", tree=theirs).strip()
    if not (ROOT / ".git").exists():
        raise WorkspaceError(
            f"{ROOT} is not a git repository, so its files cannot be compared with the bundle's; "
            f"unpack beside it: {beside}"
        )
    bare = work / "here.git"
    found = repository.content(repository.snapshot(ROOT, bare), bare)
    if found == wanted:
        return
    # Both trees in one place, to name the files that differ.
    (bare / "objects" / "info" / "alternates").open("a").write(f"{theirs / 'objects'}\n")
    names = git("diff-tree", "-r", "--name-only", found, wanted, tree=bare).splitlines()
    raise WorkspaceError(
        f"this checkout is not the one that the bundle was packed from: {some(names)} "
        f"{'differs' if len(names) == 1 else 'differ'}; it is left as it is. Unpack beside it: "
        f"{beside}"
    )


def _place_fork(bare: Path, version: str) -> None:
    """The fork's tree in its place; one that is there gives way only if nothing of it is lost."""
    place = release.tree(version)
    place.parent.mkdir(exist_ok=True)
    fresh = place.parent / f"{PARTIAL}bundle-{version}"
    old = place.parent / f"{PARTIAL}before-{version}"
    found = state(place)
    if found is not None:
        if found.own_work and not _same(place, bare):
            raise WorkspaceError(
                f"{shown(place)} holds work of yours ({found.own_work[0]}"
                + (f" and {len(found.own_work) - 1} more" if len(found.own_work) > 1 else "")
                + f") that the bundle's tree lacks; move it away (mv {shown(place)} "
                f"{shown(place)}-mine), then run this again"
            )
        if _same(place, bare):
            return
    say(f"unpacking vLLM {version} with {plural(_commits(bare), 'commit')} on top")
    unbundle.restore(bare, fresh)
    if found is not None:
        place.rename(old)
    fresh.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _same(place: Path, bare: Path) -> bool:
    """Whether a tree has the bundle's branches, tags and files."""

    def refs(tree: Path) -> set[str]:
        listing = git("for-each-ref", "--format=%(objectname) %(refname)", tree=tree)
        return {line for line in listing.splitlines() if not line.endswith(unbundle.WORKTREE)}

    with tempfile.TemporaryDirectory(dir=STATE, prefix=PARTIAL) as name:
        here = Path(name) / "here.git"
        found = repository.content(repository.snapshot(place, here), here)
    wanted = git("rev-parse", f"{unbundle.WORKTREE}^{{tree}}", tree=bare).strip()
    return found == wanted and refs(place) == refs(bare)


def _commits(bare: Path) -> int:
    listing = git("rev-list", "--count", "HEAD", "--not", "--tags=upstream/*", tree=bare)
    return int(listing)


def _into_cache(path: Path, sha256: str) -> None:
    """A pinned file to where `fetch` looks; the cache may be on another file system."""
    folder = cache_folder(sha256)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"partial-{path.name}"
    shutil.move(path, partial)
    partial.replace(folder / path.name)


def _place_headers(archive: Path) -> None:
    with zipfile.ZipFile(archive) as content, tempfile.TemporaryDirectory(dir=STATE) as name:
        content.extractall(name)
        _replace(Path(name) / archive.stem, HEADERS / archive.stem)


def _replace(fresh: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        old = place.with_name(f"{PARTIAL}{place.name}")
        place.rename(old)
        fresh.rename(place)
        shutil.rmtree(old)
    else:
        fresh.rename(place)
