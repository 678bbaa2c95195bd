# SPDX-License-Identifier: Apache-2.0
"""Check the parts of a bundle and make a checkout of them, on a machine without a network.

    python3 unbundle.py [FOLDER]        in a bundle's folder: a checkout in FOLDER (vllm-kernels)

A copy of this file travels with each bundle, so it needs nothing but Python's standard library. It
unpacks the checkout and hands over to that checkout's `make unbundle`, which installs the rest
(workspace/bundle/place.py) and sets everything up.

A part is a line that says which bundle and which part of it this is, then its share of one tar
archive. Every part is checked whole before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, cast

MANIFEST = "manifest.json"
FORMAT = 1
WORKTREE = "refs/bundle/worktree"
"""The files of a tree as they were, on top of its last commit."""
OWN, FORK = "workspace.git", "fork.git"
"""Folders in the archive: the workspace's tree and the fork's, as bundle/repository.py packs
them."""
PARTIAL = ".partial-"
CHUNK = 1 << 20


class UnbundleError(Exception):
    """One line: what is wrong, and what to do."""


def say(message: str) -> None:
    print(f"· {message}", file=sys.stderr, flush=True)


# --- the parts ------------------------------------------------------------------------------------


def heading(identity: str, number: int, count: int) -> bytes:
    """The first line of a part."""
    return f"vllm-kernels bundle {identity} part {number:04d} of {count:04d}\n".encode()


def identity_of(manifest: dict[str, Any]) -> str:
    """A hash over all that the manifest says."""
    rest = {key: value for key, value in manifest.items() if key not in ("identity", "parts")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def read_manifest(source: Path) -> dict[str, Any]:
    """The manifest of the bundle in `source`, checked against its own hash."""
    path = source / MANIFEST
    if not path.is_file():
        raise UnbundleError(
            f"there is no bundle in {source}: {MANIFEST} is missing; use the folder that make "
            "bundle wrote: FROM=<folder>"
        )
    again = "copy it again from where the bundle was packed"
    try:
        manifest = json.loads(path.read_bytes())
        known, whole = manifest["format"], manifest["identity"] == identity_of(manifest)
    except (ValueError, KeyError, TypeError):
        raise UnbundleError(f"{path} is damaged; {again}") from None
    if known != FORMAT:
        raise UnbundleError(f"{path} is of another version of the workspace; run make bundle again")
    if not whole:
        raise UnbundleError(f"{path} is damaged; {again}")
    return manifest


def check_parts(source: Path, manifest: dict[str, Any]) -> None:
    """Raise unless the folder has every part of this bundle, complete, and no other part."""
    parts, identity = manifest["parts"], manifest["identity"]
    again = "copy from where the bundle was packed, then re-run"
    missing = [part["name"] for part in parts if not (source / part["name"]).is_file()]
    if missing:
        raise UnbundleError(
            f"{len(missing)} of {len(parts)} parts are missing in {source}: "
            f"{', '.join(missing)}; {again}"
        )
    known = {part["name"] for part in parts}
    foreign = sorted(path.name for path in source.glob("part-*") if path.name not in known)
    if foreign:
        raise UnbundleError(
            f"{source / foreign[0]} is not of this bundle, which has {len(parts)} parts; move it "
            "away and re-run"
        )
    for number, part in enumerate(parts, 1):
        path, expected = source / part["name"], heading(identity, number, len(parts))
        with path.open("rb") as file:
            found = file.read(len(expected))
            if found != expected and found.startswith(b"vllm-kernels bundle "):
                raise UnbundleError(f"{path} is a part of another bundle, or another part; {again}")
            size = path.stat().st_size
            if size != part["size"]:
                raise UnbundleError(
                    f"{path} has {size} bytes, it should have {part['size']}; {again}"
                )
            digest = hashlib.sha256(found)
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != part["sha256"]:
            raise UnbundleError(f"{path} is damaged (its sha256 differs); {again}")


class Joined:
    """The parts as one stream, without their headings."""

    def __init__(self, source: Path, manifest: dict[str, Any]) -> None:
        # All headings of a bundle are equally long.
        self._skip = len(heading(manifest["identity"], 1, 1))
        self._paths = [source / part["name"] for part in manifest["parts"]]
        self._offset = 0

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        while self._paths:
            with self._paths[0].open("rb") as file:
                file.seek(self._skip + self._offset)
                if chunk := file.read(size):
                    self._offset += len(chunk)
                    return chunk
            del self._paths[0]
            self._offset = 0
        return b""


def extract(source: Path, manifest: dict[str, Any], target: Path, *, only: str = "") -> None:
    """Unpack the archive, or one top folder of it, into `target`."""
    stream = cast("BinaryIO", Joined(source, manifest))  # tarfile reads, and asks for nothing else
    with tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK) as archive:
        if hasattr(tarfile, "data_filter"):  # Debian 12's Python lacks it
            archive.extraction_filter = tarfile.data_filter
        inside = False
        for member in archive:
            if not only or member.name.split("/")[0] == only:
                archive.extract(member, target)
                inside = True
            elif inside:
                break
    for bare in target.glob("*.git"):
        (bare / "refs").mkdir(exist_ok=True)  # empty, but git requires it


# --- a tree ---------------------------------------------------------------------------------------


NO_HOME = {
    "HOME": os.devnull,
    "XDG_CONFIG_HOME": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_GRAFT_FILE": f"{os.devnull}/none",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",
}
"""As in workspace/host/git.py, which is not unpacked yet."""


def git(*arguments: str, cwd: Path) -> str:
    """Run git without the user's settings and outside any surrounding repository."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= NO_HOME | {"GIT_CEILING_DIRECTORIES": str(cwd.resolve().parent)}
    command = ["git", "-c", f"safe.directory={cwd.resolve()}", "-c", "gc.auto=0", *arguments]
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UnbundleError("git is missing; install it, e.g. apt-get install git") from None
    if done.returncode:
        complaint = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnbundleError(f"git {arguments[0]} failed in {cwd}: {complaint}")
    return done.stdout


def restore(bare: Path, tree: Path) -> None:
    """Unpack a repository to the new folder `tree`, with its uncommitted edits uncommitted."""
    tree.mkdir()
    bare.replace(tree / ".git")
    git("config", "core.bare", "false", cwd=tree)
    git("config", "core.logAllRefUpdates", "true", cwd=tree)
    git("read-tree", WORKTREE, cwd=tree)
    git("checkout-index", "--all", "--force", "--quiet", cwd=tree)
    git("update-ref", "-d", WORKTREE, cwd=tree)
    git("reset", "-q", cwd=tree)


# --- the checkout ---------------------------------------------------------------------------------


def require_machine(manifest: dict[str, Any]) -> None:
    """Raise on a machine that the bundle is not for."""
    target = manifest["target"]
    if platform.machine() != target["machine"]:
        raise UnbundleError(
            f"this is {platform.machine()}, the bundle is for {target['machine']}; pack one with "
            "this machine's inventory"
        )


def checkout(source: Path, manifest: dict[str, Any], folder: Path) -> None:
    """Unpack the checkout to the new folder `folder`, which appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{PARTIAL}unbundle-*"):
        shutil.rmtree(left, ignore_errors=True)  # of a run that was killed
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{PARTIAL}unbundle-") as work:
        extract(source, manifest, Path(work), only=OWN)
        restore(Path(work) / OWN, Path(work) / "checkout")
        (Path(work) / "checkout").rename(folder)


def main(arguments: list[str]) -> None:
    if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
        raise UnbundleError("usage: python3 unbundle.py [FOLDER]")
    source = Path(__file__).resolve().parent
    folder = Path(arguments[0] if arguments else "vllm-kernels").absolute()
    manifest = read_manifest(source)
    require_machine(manifest)
    start = folder / "workspace" / "bootstrap.py"
    if not folder.exists():
        say(f"checking {len(manifest['parts'])} parts")
        check_parts(source, manifest)
        say(f"unpacking the checkout to {folder}")
        checkout(source, manifest, folder)
    elif not start.exists():
        raise UnbundleError(f"{folder} exists and is not a checkout; use another folder")
    sys.stderr.flush()
    os.environ["FROM"] = str(source)
    os.execv(sys.executable, [sys.executable, str(start), "unbundle"])


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 - this runs on whatever the host has
        sys.exit(f"error: this is Python {platform.python_version()}; 3.11 or later is needed")
    try:
        main(sys.argv[1:])
    except UnbundleError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; re-run to continue")
    except OSError as error:
        reason = error.strerror or str(error)
        sys.exit(f"error: {reason}: {error.filename or ''}; fix that and re-run")
