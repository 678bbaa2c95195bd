# SPDX-License-Identifier: Apache-2.0
"""`make bundle`: all that a GPU host without a network needs, in parts of a size that travels.

Steps: read the host's inventory, choose what it lacks, fetch that by hash, pack our tree and the
fork's with what is not committed in them, write the parts and the manifest. What lies in the
archive is compressed already (wheels, git packs), so the archive itself is not.
"""

from __future__ import annotations

import json
import platform
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from packaging.utils import parse_wheel_filename

from workspace.bundle import packages, parts, repository, unbundle
from workspace.bundle import target as hosts
from workspace.bundle.binaries import recompressed
from workspace.bundle.packages import Choice
from workspace.bundle.target import Host
from workspace.credentials.content import listed
from workspace.credentials.files import search_tar
from workspace.environment import uv
from workspace.environment.fetch import fetch, listing, sha256
from workspace.environment.lock import Entry, locked
from workspace.environment.progress import bytes_progress
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
from workspace.host.files import new_folder, remove_partial, write_file
from workspace.host.git import git
from workspace.host.paths import LOCKS, ROOT, lock_path
from workspace.host.text import plural, say
from workspace.pins import release
from workspace.pins.model import Artifact, Uv, load

BUNDLES = ROOT / "bundle"
DEFAULT_PARTS = "2G"
TAR: Literal[1] = tarfile.GNU_FORMAT


def run(target: str | None, part_size: str | None) -> Path:
    """Pack a bundle of the selected release for the host that `target` describes; its folder.

    Raises:
        WorkspaceError: no inventory, a host that cannot run it, no network, a full disk. No half
            bundle is left.
    """
    if not target:
        raise WorkspaceError(f"name the host's inventory: make bundle TARGET=<file>; {hosts.HOW}")
    limit = parts.size(part_size or DEFAULT_PARTS)
    host, version, pins = hosts.read(Path(target)), release.selected(), load()
    hosts.require_workable(host, version, pins)
    found = prepare.ensure()
    if not (ROOT / ".git").exists():
        raise WorkspaceError(
            f"{ROOT} is not a git repository, and a bundle says which commit it holds; clone it, "
            "or run: git init && git add -A && git commit"
        )
    pinned = pins.release(version)
    binaries = pinned.binary(host.device, host.machine, host.python.short)
    wheel = fetch(binaries)
    # Under the wheel's name among the packages, or where the host cannot read it, the wheel itself.
    small = recompressed(wheel) if host.python.lzma else None
    cached = {} if small else {binaries.filename: (wheel, binaries.sha256)}
    if _needs_uv(host):
        cached |= _uv(pins.uv, host)
    start = [*packages.wheel_requirements(wheel), *packages.roots(pins, version, host)]
    locks = [lock_path(version), lock_path(version, gpu=True)]
    lock = locked((path for path in locks if path.exists()), host.markers)
    choice = packages.choose(start, lock, host, nvcc=host.has_nvcc(pinned))
    wheels = fetch_wheels(choice.packed, host)
    with tempfile.TemporaryDirectory(dir=_bundles(), prefix=".partial-") as name:
        work, tree = Path(name), release.tree(version)
        for one in (ROOT, tree):
            refuse_credentials(one)
        say("packing this checkout and the fork's tree")
        repository.pack(ROOT, work / unbundle.OWN, everything=False)
        keys = (VERSION_KEY, PATCHES_KEY)
        repository.pack(tree, work / unbundle.FORK, everything=True, settings=keys)
        _gather(work, cached, wheels, choice, host)
        if small:
            (work / "packages" / wheel.name).symlink_to(small)
        manifest = describe(host, version, found, cached, wheels, choice)
        folder = BUNDLES / manifest["name"]
        with new_folder(folder) as made:
            _write(work, made, manifest, limit)
            shutil.rmtree(folder, ignore_errors=True)  # an earlier one, of the same name
    _report(folder, manifest, choice)
    return folder


def refuse_credentials(tree: Path) -> None:
    """Raise where an edit that would travel along holds a token, a key or a password."""
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name in (entry[3:] for entry in uncommitted(tree)):
                if (tree / name).is_file() and not (tree / name).is_symlink():
                    archive.add(tree / name, name)
        file.seek(0)
        if found := search_tar(file):
            raise WorkspaceError(
                f"no bundle was made: {shown(tree)} holds {listed(found)}, not "
                "committed and not ignored, so it would travel along; ignore or move it"
            )


def _bundles() -> Path:
    BUNDLES.mkdir(exist_ok=True)
    remove_partial(BUNDLES)  # of a run that was killed; we hold the lock
    return BUNDLES


def _needs_uv(host: Host) -> bool:
    """Whether there is nothing on the host that installs packages: 18 MB that others are spared."""
    return not host.tools.get("uv") and "pip" not in host.packages


def _uv(pinned: Uv, host: Host) -> dict[str, tuple[Path, str]]:
    """The pinned uv, under the name that bootstrap looks for."""
    wanted = pinned.sha256.get(host.machine)
    names = [file.filename for file in listing("uv") if file.sha256 == wanted]
    if wanted is None or not names:
        raise WorkspaceError(
            f"the host has neither pip nor uv, and the package index has no uv {pinned.version} "
            f"for {host.machine}; install pip there, then make its inventory anew"
        )
    path = fetch(Artifact(project="uv", filename=names[0], sha256=wanted))
    return {uv.wheel_name(pinned.version): (path, wanted)}


# --- wheels ---------------------------------------------------------------------------------------


def fetch_wheels(wanted: list[Entry], host: Host) -> dict[str, Path]:
    """Package → its wheel in the cache: of those whose hash the lock has, the best for the host.

    Raises:
        WorkspaceError: the index cannot be reached, or has no wheel of it that runs there.
    """
    if not wanted:
        return {}
    say(f"looking up {plural(len(wanted), 'package')} that the host lacks")
    order = {tag: number for number, tag in enumerate(hosts.supported_tags(host))}
    with ThreadPoolExecutor(max_workers=8) as pool:
        chosen = list(pool.map(lambda entry: _best_wheel(entry, order, host), wanted))
    return {
        entry.name: fetch(artifact) for entry, artifact in zip(wanted, chosen, strict=True)
    }  # fmt: skip


def _best_wheel(entry: Entry, order: dict[Any, int], host: Host) -> Artifact:
    fitting = []
    for file in listing(entry.name):
        if file.sha256 in entry.sha256 and file.filename.endswith(".whl"):
            *_, tags = parse_wheel_filename(file.filename)
            ranks = [order[tag] for tag in tags if tag in order]
            if ranks:
                fitting.append((min(ranks), file))
    if not fitting:
        raise WorkspaceError(
            f"the package index has no wheel of {entry.name} {entry.version} that the lock names "
            f"and that runs on {host.machine} with glibc {host.libc.version} and Python "
            f"{host.python.short}; install that version on the host, then make its inventory anew"
        )
    _, file = min(fitting, key=lambda pair: pair[0])
    return Artifact(project=entry.name, filename=file.filename, sha256=file.sha256)


# --- the archive ----------------------------------------------------------------------------------


def _gather(
    work: Path,
    cached: dict[str, tuple[Path, str]],
    wheels: dict[str, Path],
    choice: Choice,
    host: Host,
) -> None:
    """Lay out what the archive holds, as `placing` takes it apart. Big files are linked."""
    (work / "cache").mkdir()
    for name, (path, _) in cached.items():
        (work / "cache" / name).symlink_to(path)
    (work / "packages" / "wheels").mkdir(parents=True)
    lines = []
    for entry in choice.packed:
        path = wheels[entry.name]
        (work / "packages" / "wheels" / path.name).symlink_to(path)
        lines.append(f"{entry.name}=={entry.version} --hash=sha256:{sha256(path)}\n")
    (work / "packages" / "requirements.txt").write_text("".join(lines))
    (work / "headers").mkdir()
    there = {*host.packages, *wheels}
    for name, folder, package in _headers():
        if package.split()[0] not in there:
            _zip_headers(work / "headers" / f"{name}.zip", name, folder, package)


def _headers() -> Iterable[tuple[str, Path, str]]:
    """Headers that our kernels take from a package: name, folder, package with version."""
    from custom_kernels.compile import sources

    return sources.header_packages()


def _zip_headers(archive: Path, name: str, folder: Path, package: str) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as content:
        content.writestr(f"{name}/package", f"{package}\n")
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                content.write(path, f"{name}/include/{path.relative_to(folder)}")


def _write(work: Path, made: Path, manifest: dict[str, Any], limit: int) -> None:
    """Parts, manifest and the script that reads them."""
    paths = [path for path in sorted(work.rglob("*")) if path.is_file()]
    # Our own tree comes first: the checkout is unpacked before anything else.
    paths.sort(key=lambda path: path.relative_to(work).parts[0] != unbundle.OWN)
    entries = [(path, _entry(path, work)) for path in paths]
    total = _archive_size([entry for _, entry in entries])
    manifest["contents"] = [{"path": entry.name, "size": entry.size} for _, entry in entries]
    manifest["size"] = total
    manifest["identity"] = unbundle.identity_of(manifest)
    sink = parts.Parts(made, manifest["identity"], total, limit)
    with (
        bytes_progress() as bar,
        tarfile.open(fileobj=sink, mode="w|", format=TAR) as archive,
    ):
        task = bar.add_task("writing parts", total=total)
        for path, entry in entries:
            with path.open("rb") as file:
                archive.addfile(entry, file)
            bar.advance(task, entry.size)
    manifest["parts"] = sink.finish()
    write_file(made / unbundle.MANIFEST, _json(manifest))
    shutil.copy(unbundle.__file__, made / "unbundle.py")


def _archive_size(entries: list[tarfile.TarInfo]) -> int:
    """Headers, contents in whole blocks, two empty blocks, filled up to a whole record."""
    block, record = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
    total = sum(len(entry.tobuf(TAR)) + -(-entry.size // block) * block for entry in entries)
    return -(-(total + 2 * block) // record) * record


def _entry(path: Path, work: Path) -> tarfile.TarInfo:
    """The same content gives the same archive: no owner, no time."""
    entry = tarfile.TarInfo(str(path.relative_to(work)))
    entry.size, entry.mode = path.stat().st_size, 0o644
    return entry


def _json(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode() + b"\n"


# --- what is in it --------------------------------------------------------------------------------


def describe(
    host: Host,
    version: str,
    found: ForkState,
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
            "commit": found.head,
            "applied": git("rev-parse", APPLIED, tree=release.tree(version)).strip(),
            "own_commits": found.own_commits,
            "uncommitted": found.uncommitted,
        },
        "locks": {path.name: sha256(path) for path in sorted(LOCKS.glob("*.txt"))},
        "pins": {
            "vllm": version,
            "torch": pinned.torch,
            "triton": pinned.triton,
            "cupy": pinned.cupy,
            "cuda": pinned.cuda.release,
        },
        "target": {
            "machine": host.machine,
            "system": host.system,
            "glibc": host.libc.version,
            "python": host.python.model_dump(),
            "torch": host.torch.model_dump() if host.torch else None,
            "nvcc": host.nvcc.model_dump() if host.nvcc else None,
            "gpus": [gpu.model_dump() for gpu in host.gpus],
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
        say(f"the host's own, at other versions than the pins: {', '.join(differ)}")
    for reason in dict.fromkeys(choice.left_out.values()):
        names = [name for name, why in choice.left_out.items() if why == reason]
        say(f"left out, {reason}: {', '.join(names)}")
    for who in ("workspace", "fork"):
        if edited := manifest[who]["uncommitted"]:
            say(f"uncommitted, and in the bundle ({who}): {', '.join(edited)}")
    total = sum(part["size"] for part in manifest["parts"]) / 1e6
    place = folder.relative_to(ROOT)
    say(f"{place}: {manifest['summary']}; {plural(len(manifest['parts']), 'part')}, {total:.1f} MB")
    say(f"copy that folder to the host, then there: python3 {folder.name}/unbundle.py")
