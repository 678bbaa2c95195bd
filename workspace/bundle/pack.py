# SPDX-License-Identifier: Apache-2.0
"""`make bundle`: what a GPU host without a network needs, in parts of a given size.

Steps: read the host's inventory, choose what it lacks, fetch that by hash, pack the checkout and
the fork's tree with their uncommitted edits, write the parts and the manifest.
"""

from __future__ import annotations

import platform
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from packaging.tags import Tag
from packaging.utils import parse_wheel_filename
from packaging.version import Version

from workspace import verbs
from workspace.bundle import archive, packages, repository, unbundle
from workspace.bundle import target as hosts
from workspace.bundle.packages import Choice
from workspace.bundle.target import Host
from workspace.credentials.content import listed
from workspace.credentials.files import search_tar
from workspace.environment import uv
from workspace.environment.fetch import fetch, listing, sha256
from workspace.environment.lock import Entry, locked
from workspace.fork import prepare
from workspace.fork.tree_state import (
    APPLIED,
    PATCHES_KEY,
    VERSION_KEY,
    ForkState,
    shown,
    uncommitted,
)
from workspace.host.errors import WorkspaceError
from workspace.host.files import PARTIAL, new_folder, remove_partial
from workspace.host.git import git
from workspace.host.paths import LOCKS, ROOT, lock_path
from workspace.host.text import plural, say
from workspace.pins import release
from workspace.pins.model import Artifact, Pins, Release, Uv, load

BUNDLES = ROOT / "bundle"
DEFAULT_PARTS = "2G"
LARGEST = 5
"""Packages that are named with their size."""


def run(options: verbs.Bundle) -> None:
    """Pack a bundle of the selected release for the host that TARGET= describes.

    Raises:
        WorkspaceError: no inventory, a host that cannot run it, no network, a full disk. Nothing
            unfinished is left.
    """
    if not options.target:
        raise WorkspaceError(f"name the host's inventory: make bundle TARGET=<file>; {hosts.HOW}")
    limit = archive.part_size(options.parts or DEFAULT_PARTS)
    host, version, pins = hosts.read(Path(options.target)), release.selected(), load()
    hosts.require_workable(host, version, pins)
    fork = prepare.ensure()
    if not (ROOT / ".git").exists():
        raise WorkspaceError(
            f"{ROOT} is not a git repository, and a bundle says which commit it holds; clone it, "
            "or run: git init && git add -A && git commit"
        )
    pinned = pins.release(version)
    binaries = pinned.binary(host.device, host.machine, host.python.short)
    wheel = fetch(binaries)
    # Under the wheel's name among the packages, or where the host cannot read it, the wheel itself.
    small = archive.recompressed(wheel) if host.python.lzma else None
    cached = {} if small else {binaries.filename: (wheel, binaries.sha256)}
    if _needs_uv(host):
        cached |= _uv(pins.uv, host)
    start = [*packages.wheel_requirements(wheel), *packages.roots(pins, version, host)]
    locks = [lock_path(version), lock_path(version, gpu=True)]
    lock = locked((path for path in locks if path.exists()), host.markers)
    unfit = hosts.unfit_torch(host, pinned)
    if unfit:
        say(_torch_comes_along(unfit, host, pinned, pins))
    nvcc = host.has_nvcc(pinned)
    choice = packages.choose(start, lock, host, nvcc=nvcc, unfit_torch=unfit)
    wheels = fetch_wheels(choice.packed, host)
    BUNDLES.mkdir(exist_ok=True)
    remove_partial(BUNDLES)  # of a run that was killed; this one holds the lock
    with tempfile.TemporaryDirectory(dir=BUNDLES, prefix=PARTIAL) as name:
        work, tree = Path(name), release.tree(version)
        refuse_credentials(ROOT)
        refuse_credentials(tree)
        say("packing this checkout and the fork's tree")
        repository.pack(ROOT, work / unbundle.OWN, everything=False)
        keys = (VERSION_KEY, PATCHES_KEY)
        repository.pack(tree, work / unbundle.FORK, everything=True, settings=keys)
        archive.lay_out(work, cached, wheels, choice, host)
        if small:
            (work / "packages" / wheel.name).symlink_to(small)
        manifest = describe(host, version, fork, cached, wheels, choice)
        folder = BUNDLES / manifest["name"]
        with new_folder(folder) as unfinished:
            archive.write(work, unfinished, manifest, limit)
            if folder.exists():  # an earlier one, of the same name
                folder.rename(work / "replaced")
    _report(folder, manifest, choice)
    if unfit:
        say(_torch_share(wheels))


def _torch_comes_along(unfit: str, host: Host, pinned: Release, pins: Pins) -> str:
    """That the bundle is large, why, and what would make it smaller."""
    line = f"{unfit}; torch {pinned.torch} and what it needs come along"
    if host.torch is None:
        return f"{line} (another Python there that has torch: make the inventory with that one)"
    other = pins.built_for(Version(host.torch.version).public)
    if other is None or hosts.unfit_torch(host, pins.release(other)):
        return line
    return f"{line} (a bundle without: VLLM_VERSION={other}, built for the host's)"


def _torch_share(wheels: dict[str, Path]) -> str:
    """How much of the bundle is there because torch is."""
    sizes = {
        name: path.stat().st_size / 1e6
        for name, path in wheels.items()
        if name in packages.TORCH or packages.LIBRARY.fullmatch(name)
    }
    largest = sorted(sizes, key=lambda name: -sizes[name])[:LARGEST]
    named = ", ".join(f"{name} {sizes[name]:.0f}" for name in largest)
    return f"{sum(sizes.values()):.0f} MB of it are torch and what it needs: {named}"


def refuse_credentials(tree: Path) -> None:
    """Raise if an uncommitted file that would be packed holds a token, a key or a password."""
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as edits:
            for name in (entry[3:] for entry in uncommitted(tree)):
                if (tree / name).is_file() and not (tree / name).is_symlink():
                    edits.add(tree / name, name)
        file.seek(0)
        if found := search_tar(file):
            raise WorkspaceError(
                f"no bundle was made: {shown(tree)} holds {listed(found)}, not "
                "committed and not ignored, so it would be packed; ignore or move it"
            )


def _needs_uv(host: Host) -> bool:
    """Whether nothing on the host installs packages; uv takes 18 MB."""
    return not host.tools.get("uv") and "pip" not in host.packages


def _uv(pinned: Uv, host: Host) -> dict[str, tuple[Path, str]]:
    """The pinned uv, under the name that bootstrap looks for."""
    wanted = pinned.sha256.get(host.machine)
    names = [file.filename for file in listing("uv") if file.digests["sha256"] == wanted]
    if wanted is None or not names:
        raise WorkspaceError(
            f"the host has neither pip nor uv, and the package index has no uv {pinned.version} "
            f"for {host.machine}; install pip on the host, then make its inventory again"
        )
    path = fetch(Artifact(project="uv", filename=names[0], sha256=wanted))
    return {uv.wheel_name(pinned.version): (path, wanted)}


# --- wheels ---------------------------------------------------------------------------------------


def fetch_wheels(wanted: list[Entry], host: Host) -> dict[str, Path]:
    """Package → its wheel in the cache: the best for the host whose hash the lock has.

    Raises:
        WorkspaceError: the index cannot be reached, or has no wheel that runs on the host.
    """
    if not wanted:
        return {}
    say(f"looking up {plural(len(wanted), 'package')} that the host lacks")
    order = {tag: number for number, tag in enumerate(hosts.supported_tags(host))}
    with ThreadPoolExecutor(max_workers=8) as pool:
        chosen = list(pool.map(partial(_best_wheel, order=order, host=host), wanted))
    return {artifact.project: fetch(artifact) for artifact in chosen}


def _best_wheel(entry: Entry, order: dict[Tag, int], host: Host) -> Artifact:
    ranked = {}
    for file in listing(entry.name):
        if file.digests["sha256"] in entry.sha256 and file.filename.endswith(".whl"):
            *_, tags = parse_wheel_filename(file.filename)
            if ranks := [order[tag] for tag in tags if tag in order]:
                ranked[file.filename] = min(ranks), file.digests["sha256"]
    if not ranked:
        raise WorkspaceError(
            f"the package index has no wheel of {entry.name} {entry.version} that the lock names "
            f"and that runs on {host.machine} with glibc {host.libc.version} and Python "
            f"{host.python.short}; install that version on the host, then make its inventory again"
        )
    filename = min(ranked, key=lambda name: ranked[name][0])
    return Artifact(project=entry.name, filename=filename, sha256=ranked[filename][1])


# --- what is in it --------------------------------------------------------------------------------


def describe(
    host: Host,
    version: str,
    fork: ForkState,
    cached: dict[str, tuple[Path, str]],
    wheels: dict[str, Path],
    choice: Choice,
) -> dict[str, Any]:
    """The manifest, without what is only known when the parts are written."""
    pinned = load().release(version)
    commit, edited = git("rev-parse", "HEAD", tree=ROOT).strip(), uncommitted(ROOT)
    dirty = "-dirty" if edited else ""
    tag = f"cp{host.python.short.replace('.', '')}"
    return {
        "format": unbundle.FORMAT,
        "name": f"vllm-{version}-{host.device}-{tag}-{host.machine}-{commit[:8]}{dirty}",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "made_on": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "summary": (
            f"vLLM {version} for {host.device}, workspace {commit[:8]}{dirty}, "
            f"{plural(len(wheels), 'package')}"
        ),
        "device": host.device,
        "workspace": {"commit": commit, "dirty": bool(edited), "uncommitted": edited},
        "fork": {
            "commit": fork.head,
            "applied": git("rev-parse", APPLIED, tree=release.tree(version)).strip(),
            "own_commits": fork.own_commits,
            "uncommitted": fork.uncommitted,
        },
        "locks": {path.name: sha256(path) for path in sorted(LOCKS.glob("*.txt"))},
        "pins": {
            "vllm": version,
            "cuda": pinned.cuda.release,
            **pinned.model_dump(include={"torch", "triton", "cupy"}),
        },
        "target": {
            "glibc": host.libc.version,
            **host.model_dump(include={"machine", "system", "python", "torch", "nvcc", "gpus"}),
        },
        "cache": {name: sha for name, (_, sha) in cached.items()},
        "packages": [
            {
                "name": entry.name,
                "version": entry.version,
                "file": wheels[entry.name].name,
                "why": choice.why[entry.name],
            }
            for entry in choice.packed
        ],
        "hosts_own": {
            kept.name: {"host": kept.host, "pinned": kept.pinned} for kept in choice.kept
        },
        "left_out": choice.left_out,
    }


def _report(folder: Path, manifest: dict[str, Any], choice: Choice) -> None:
    differ = [
        f"{kept.name} {kept.host} (pinned {kept.pinned})" for kept in choice.kept if kept.differs
    ]
    if differ:
        say(f"kept as the host has them, at other versions than the pins: {', '.join(differ)}")
    for reason in dict.fromkeys(choice.left_out.values()):
        names = [name for name, why in choice.left_out.items() if why == reason]
        say(f"left out, {reason}: {', '.join(names)}")
    for who in ("workspace", "fork"):
        if edited := manifest[who]["uncommitted"]:
            say(f"uncommitted, and in the bundle ({who}): {', '.join(edited)}")
    total = sum(part["size"] for part in manifest["parts"]) / 1e6
    path = folder.relative_to(ROOT)
    say(f"{path}: {manifest['summary']}; {plural(len(manifest['parts']), 'part')}, {total:.1f} MB")
    say(f"copy that folder to the host and run there: python3 {folder.name}/unbundle.py")
