# SPDX-License-Identifier: Apache-2.0
"""vllm-fork/src: the pinned release with our patches as commits on it.

Steps: fetch the sdist, verify it, unpack it, commit it as the pristine release, commit the
patches on top. All of that happens beside the place; one rename puts it there. A tree that is
there already is only ever changed when it holds nothing but what we put into it.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from workspace.bootstrap import say
from workspace.errors import WorkspaceError
from workspace.fork_tree import APPLIED, PATCHES_KEY, VERSION_KEY, ForkState, git, state
from workspace.paths import FORK, FORK_SRC, PATCHES, ROOT
from workspace.pins import Release, load

# Written by setup.py or by the packing of the sdist, and so no part of the pristine release.
GENERATED = ("PKG-INFO", "vllm.egg-info", "vllm/_version.py")
EPOCH = "2000-01-01T00:00:00+00:00"
"""The pristine commit's date: fixed, so that the same release is the same commit everywhere."""


def patch_files(version: str) -> list[Path]:
    return sorted((PATCHES / version).glob("*.patch"))


def patches_digest(patches: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in patches:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def upstream_tag(version: str) -> str:
    return f"upstream/{version}"


def _identity(name: str, email: str, date: str) -> dict[str, str]:
    return {
        f"GIT_{role}_{field}": value
        for role in ("AUTHOR", "COMMITTER")
        for field, value in (("NAME", name), ("EMAIL", email), ("DATE", date))
    }


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


def commit_pristine(tree: Path, version: str, release: Release) -> None:
    """Make the unpacked release a repository whose one commit is the tagged release."""
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
    if release.tree and found != release.tree:
        raise WorkspaceError(
            f"the unpacked vLLM {version} is tree {found[:12]}, pinned is {release.tree[:12]}; "
            "check pins.toml"
        )
    git(
        "commit", "-q", "-m", f"vLLM {version}, as released",
        tree=tree, env=_identity("vLLM contributors", "vllm@upstream.invalid", EPOCH),
    )  # fmt: skip
    git("tag", upstream_tag(version), tree=tree)
    git("update-ref", APPLIED, "HEAD", tree=tree)
    git("config", VERSION_KEY, version, tree=tree)


def check_preimages(tree: Path, patch: Path, index: dict[str, str]) -> None:
    """Refuse a patch whose files are not, byte for byte, those that it was made for.

    Without context lines git would put a hunk wherever its line number points to.
    """
    listing = git("ls-files", "-s", "-z", tree=tree, env=index).split("\0")
    blobs = {entry.split("\t", 1)[1]: entry.split()[1] for entry in listing if entry}
    for section in patch.read_text(errors="surrogateescape").split("\ndiff --git ")[1:]:
        header, at, _ = section.partition("\n@@ ")
        if not at:
            continue
        names = re.findall(r"^--- (?:a/)?(.+)$", header, re.MULTILINE)
        hashes = re.findall(r"^index ([0-9a-f]{40})\.\.[0-9a-f]{40}", header, re.MULTILINE)
        if not names or not hashes:
            raise WorkspaceError("it lacks full index lines; make it with git diff --full-index")
        if names[0] != "/dev/null" and blobs.get(names[0]) != hashes[0]:
            found = blobs.get(names[0], "missing")[:12]
            hunk = section.split("\n@@ ", 1)[1].split("@@")[0].strip()
            raise WorkspaceError(
                f"{names[0]} (hunk {hunk}) is {found}, the patch was made for {hashes[0][:12]}"
            )


def commit_patches(tree: Path, base: str, patches: list[Path]) -> str:
    """Commit each patch on `base` without touching the working tree; returns the last commit.

    Raises:
        WorkspaceError: names the patch, the file and the hunk that do not apply.
    """
    with tempfile.TemporaryDirectory() as work:
        index = {"GIT_INDEX_FILE": str(Path(work) / "index")}
        git("read-tree", base, tree=tree, env=index)
        tip = base
        for patch in patches:
            message, body = Path(work) / "message", Path(work) / "body"
            header = git("mailinfo", str(message), str(body), tree=tree, stdin=patch.read_bytes())
            fields = dict(line.split(": ", 1) for line in header.splitlines() if ": " in line)
            try:
                check_preimages(tree, patch, index)
                git("apply", "--cached", "--unidiff-zero", str(patch), tree=tree, env=index)
            except WorkspaceError as error:
                where = patch.relative_to(ROOT) if patch.is_relative_to(ROOT) else patch
                detail = str(error).rsplit(": error: ", 1)[-1].removeprefix("error: ")
                raise WorkspaceError(
                    f"{where} does not apply: {detail}; {tree.name} is as it was"
                ) from None
            text = f"{fields.get('Subject', patch.stem)}\n\n{message.read_text()}".strip() + "\n"
            tree_hash = git("write-tree", tree=tree, env=index).strip()
            tip = git(
                "commit-tree", tree_hash, "-p", tip,
                tree=tree,
                env=_identity(fields["Author"], fields["Email"], fields["Date"]),
                stdin=text.encode(),
            ).strip()  # fmt: skip
        return tip


def _move_to(tree: Path, tip: str, digest: str) -> None:
    """Check out the commit of the last patch. git refuses where a changed file is in the way."""
    git("reset", "-q", "--keep", tip, tree=tree)
    git("update-ref", APPLIED, tip, tree=tree)
    git("config", PATCHES_KEY, digest, tree=tree)


def create(version: str, release: Release, patches: list[Path]) -> None:
    """Build the tree beside its place and rename it when it is whole."""
    # Imported late: a run with nothing to do would take twice as long.
    from workspace.fetch import fetch

    for stale in FORK.glob(".src-*"):
        shutil.rmtree(stale)
    work = Path(tempfile.mkdtemp(dir=FORK, prefix=".src-"))
    try:
        sdist = fetch(release.sdist)
        say(f"unpacking vLLM {version}, applying {len(patches)} patches")
        tree = unpack(sdist, work)
        commit_pristine(tree, version, release)
        tip = commit_patches(tree, upstream_tag(version), patches)
        _move_to(tree, tip, patches_digest(patches))
        tree.replace(FORK_SRC)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def reapply(found: ForkState, version: str, patches: list[Path]) -> None:
    """Our patches changed: put the new ones in place of the old where nobody's work is on them."""
    if found.own_work:
        say(
            f"{FORK.name}/patches/{version} changed, but src holds work of yours "
            f"({len(found.uncommitted)} uncommitted, {len(found.own_commits)} commits): left as "
            "it is. Save it (git format-patch), move src away and run: make dev"
        )
        return
    tip = commit_patches(FORK_SRC, upstream_tag(version), patches)
    _move_to(FORK_SRC, tip, patches_digest(patches))
    say(f"patches changed: src now has {len(patches)} of them")


def ensure() -> ForkState:
    """The fork at its place, made if it is missing, its patches renewed if they changed."""
    pins = load()
    version = pins.vllm.default
    release = pins.release(version)
    patches = patch_files(version)
    found = state()
    if found is None:
        create(version, release, patches)
    elif found.version != version:
        raise WorkspaceError(
            f"{FORK_SRC} holds vLLM {found.version}, pins.toml asks for {version}; save your work "
            "in it, move it away and run: make dev"
        )
    elif found.patches_digest != patches_digest(patches):
        reapply(found, version, patches)
    else:
        return found
    found = state()
    if found is None:
        raise WorkspaceError(f"{FORK_SRC} vanished while it was made; run: make dev")
    return found
