# SPDX-License-Identifier: Apache-2.0
"""Install the fork and the kernels into the environment, editable, with the right binaries.

vLLM's Python files are those of the tree of the selected release. Compiled files (and sources that
upstream's build fetches) come from the released wheel of the same version: exactly the files that
the wheel has and the sdist lacks. So an edit in the tree is live in the next run, and nothing is
compiled.
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
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from workspace.environment import system_packages, uv
from workspace.environment.inventory import headers, libnuma
from workspace.fork.built_from import (
    Manifest,
    manifest_path,
    read_manifest,
    remove_unused,
    write_manifest,
)
from workspace.fork.prepare import GENERATED, upstream_tag
from workspace.fork.tree_state import shown
from workspace.host import plain_path, settings
from workspace.host.errors import WorkspaceError
from workspace.host.files import write_file
from workspace.host.git import git
from workspace.host.paths import KERNELS, STATE
from workspace.host.text import last_line, say
from workspace.pins.model import Artifact, Device, load
from workspace.pins.release import bundled, selected, tree


def version_label(version: str, device: Device, cuda_release: str) -> str:
    """The version to install: vLLM selects its CPU platform by `cpu` in it."""
    suffix = "cpu" if device == "cpu" else f"cu{cuda_release.replace('.', '')}"
    return f"{version}+{suffix}"


def checksum(path: Path) -> int | None:
    """CRC-32 of a file, None if it does not exist."""
    if not path.is_file():
        return None
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def binary_members(wheel: zipfile.ZipFile, tracked: set[str]) -> list[zipfile.ZipInfo]:
    """The files of the wheel that are not sources of the release."""
    return [
        member
        for member in wheel.infolist()
        if not member.is_dir()
        and ".dist-info/" not in member.filename
        and member.filename not in tracked
    ]


def exclude_patterns(names: list[str], tracked: set[str]) -> list[str]:
    """Shortest git patterns that match the extracted files and no file of the release."""
    folders = {str(parent) for name in tracked for parent in Path(name).parents}
    patterns = set()
    for name in names:
        parents = [str(p) for p in reversed(Path(name).parents)][1:]
        new = next((p for p in parents if p not in folders), None)
        patterns.add(f"/{new}/" if new else f"/{name}")
    return sorted(patterns)


def tracked_files(folder: Path) -> set[str]:
    """The files of the pristine release, and those that setup.py writes."""
    listing = git("ls-tree", "-r", "-z", "--name-only", upstream_tag(selected()), tree=folder)
    return {*listing.split("\0"), *GENERATED}


def exclude_binaries(folder: Path, manifest: Manifest) -> None:
    """Add the compiled files to git's local excludes, below the entries of the user."""
    exclude = folder / ".git" / "info" / "exclude"
    header = "# Below, written by `make dev`: compiled files from the released wheel.\n"
    users = exclude.read_text().split(header)[0] if exclude.exists() else ""
    patterns = exclude_patterns(sorted(manifest.names()), tracked_files(folder))
    text = users + header + "".join(f"{pattern}\n" for pattern in [*patterns, "*.partial"])
    write_file(exclude, text.encode())


def edited(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Those of the files that are neither as in the wheel nor as a local build made them."""
    result = []
    for name in names:
        built = manifest.own.get(name)
        known = {None, manifest.files.get(name), built.crc if built else None}
        if known != {None} and checksum(folder / name) not in known:
            result.append(name)
    return result


def extract_binaries(
    artifact: Artifact, device: Device, *, renew: bool = False, force: bool = False
) -> None:
    """Extract the compiled files of a wheel into the tree, unless that was done.

    Each file is written under a temporary name and renamed; the manifest is written last. Files of
    a local build (`make fork-build`) stay if the wheel is the same, unless with `renew`.

    Raises:
        WorkspaceError: an extracted file was edited since; `force` overwrites it.
    """
    folder, before = tree(), read_manifest()
    present = all((folder / name).exists() for name in before.names())
    if before.sha256 == artifact.sha256 and present and not (before.own and renew):
        return
    wheel_path = released_wheel(artifact)
    changed = edited(folder, before, sorted(before.names()))
    if changed and not force:
        raise WorkspaceError(
            f"{changed[0]} in {shown(folder)} was changed after it was extracted from "
            f"{before.wheel} ({len(changed)} such files); save it, then run: make dev FORCE=1"
        )
    if before.own:
        say(f"replacing {len(before.own)} files of your build; make fork-build restores them")
    for name in before.names():
        (folder / name).unlink(missing_ok=True)
    manifest_path().unlink(missing_ok=True)
    say(f"extracting the {device} binaries from {artifact.filename}")
    with zipfile.ZipFile(wheel_path) as wheel:
        members = binary_members(wheel, tracked_files(folder))
        for member in members:
            _extract(wheel, member, folder / member.filename)
    files = {member.filename: member.CRC for member in members}
    manifest = Manifest(wheel=artifact.filename, sha256=artifact.sha256, device=device, files=files)
    exclude_binaries(folder, manifest)
    write_manifest(manifest)
    remove_unused(folder, manifest)


def _extract(wheel: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """Write a file of the wheel beside its place and rename it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".partial")
    with wheel.open(member) as source, temporary.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 22)
    temporary.chmod((member.external_attr >> 16) & 0o777 or 0o644)
    temporary.replace(target)


def released_wheel(artifact: Artifact) -> Path:
    """A pinned wheel of vLLM, from the bundle, the cache or the index."""
    # Imported here: a run with nothing to do would take twice as long.
    from workspace.environment.fetch import fetch

    in_bundle = bundled(selected()) / artifact.filename
    return in_bundle if in_bundle.exists() else fetch(artifact)


def extract_replaced(manifest: Manifest, folder: Path) -> None:
    """Put those files of the released wheel into `folder` that a local build replaced."""
    replaced = sorted(manifest.own.keys() & manifest.files.keys())
    if replaced and manifest.device:
        artifact = load().release().binary(manifest.device)
        with zipfile.ZipFile(released_wheel(artifact)) as wheel:
            for name in replaced:
                _extract(wheel, wheel.getinfo(name), folder / name)


def installer(prefix: Path) -> list[str]:
    """What installs into the environment at `prefix`: the workspace's uv; for ENV=system, which
    fetches nothing, the host's uv or pip."""
    pinned = uv.binary_path(load().uv.version)
    tool = str(pinned) if pinned.exists() else shutil.which("uv")
    # By its real path, not a link to it: installed scripts contain it.
    python = str(prefix.resolve() / "bin" / "python")
    if tool:
        return [tool, "pip", "install", "-q", "--python", python]
    return [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]


def editable(folder: Path, fingerprint: str, *, env: dict[str, str] | None = None) -> None:
    """Install `folder` editable unless that was done for the same fingerprint."""
    stamp = Path(sys.prefix) / f"workspace-{folder.name}.json"
    wanted = json.dumps({"folder": str(folder), "fingerprint": fingerprint})
    if stamp.exists() and stamp.read_text() == wanted:
        return
    stamp.unlink(missing_ok=True)
    say(f"installing {shown(folder)}, editable")
    result = subprocess.run(
        # Not by its path: brackets, # and ; in it have a meaning for pip and uv.
        [*installer(Path(sys.prefix)), "--no-deps", "--no-build-isolation", "-e", "."],
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
        # uv and pip may end with a hint after the error.
        errors = re.findall(r"^.*(?:error|fatal)\b.*$", result.stderr, re.IGNORECASE | re.MULTILINE)
        reason = last_line(errors[-1] if errors else result.stderr)
        raise WorkspaceError(f"installing {folder} failed: {reason}; see {log}")
    write_file(stamp, wanted.encode())
    # An editable install is a .pth file, which Python reads only when it starts.
    site.addsitedir(sysconfig.get_path("purelib"))
    importlib.invalidate_caches()


def _at_startup(name: str, line: str) -> None:
    """Let every Python of this environment run `line` when it starts, and this one now."""
    packages = sysconfig.get_path("purelib")
    write_file(Path(packages) / f"workspace-{name}.pth", f"{line}\n".encode())
    site.addsitedir(packages)


def ensure_system_files(device: Device) -> None:
    """Provide what the engine needs from the system, if the system lacks it.

    vLLM's CPU binaries need libnuma: once it is loaded, the loader finds it by name. What
    torch.compile and Triton compile at run time includes Python.h: compilers search CPATH.
    torch.compile calls openssl to hash the headers that it precompiles.
    """
    _use_plain_path()
    if shutil.which("openssl") is None:
        why = "torch.compile calls the program openssl, which this system lacks"
        added = f"{os.pathsep}{system_packages.unpack('openssl', why) / 'usr/bin'}"
        _at_startup(
            "openssl",
            f"import os; added = {added!a}; old = os.environ.get('PATH', os.defpath); "
            "added in old or os.environ.update(PATH=old + added)",
        )
    if device == "cpu" and not libnuma():
        why = "vLLM's CPU engine needs libnuma.so.1, which this system lacks"
        folder = system_packages.unpack("libnuma1", why)
        (library,) = folder.glob("usr/lib/*/libnuma.so.1")
        _at_startup("libnuma", f"import ctypes; ctypes.CDLL({str(library)!a})")
    # On a GPU vLLM requires FlashInfer unless this is set: its sampler does not start without.
    switch = "VLLM_USE_FLASHINFER_SAMPLER"
    without = device == "cuda" and importlib.util.find_spec("flashinfer") is None
    if without and os.environ.get(switch) != "0":
        say(f"FlashInfer is not installed: {switch}=0 is set for every Python of this environment")
        _at_startup(
            "flashinfer",
            "import importlib.util, os; importlib.util.find_spec('flashinfer') or "
            f"os.environ.setdefault({switch!r}, '0')",
        )
    if headers() is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        why = "vLLM compiles at run time and needs Python.h, which this system lacks"
        include = system_packages.unpack(f"libpython{version}-dev", why) / "usr/include"
        added = os.pathsep.join([str(include / f"python{version}"), str(include)])
        _at_startup(
            "headers",
            f"import os; added = {added!a}; old = os.environ.get('CPATH', ''); "
            "added in old or os.environ.update(CPATH=added + (os.pathsep + old if old else ''))",
        )


def _use_plain_path() -> None:
    """Let a Python that is started directly, not by make, import packages by a plain path, too.

    In a checkout with spaces in its path, torch.compile does not quote the include folders for the
    compiler. If the link is deleted, packages have their real paths.
    """
    real = Path(sys.prefix).resolve()
    plain = plain_path.plain(real.parent) / real.name
    if plain != real:
        _at_startup(
            "plain-name",
            f"import os, sys; real, plain = {str(real)!a}, {str(plain)!a}; "
            "os.path.realpath(plain) == real and sys.path.__setitem__(slice(None), "
            "[plain + p[len(real):] if p.startswith(real + '/') else p for p in sys.path])",
        )


def install_fork(device: Device, *, renew: bool = False, force: bool = False) -> None:
    """Extract the binaries for the device, then install the tree editable.

    `renew` restores the released wheel's binaries in place of those of a local build; `force` also
    replaces those that were edited by hand.
    """
    version, release, folder = selected(), load().release(), tree()
    if settings.current().mode == "system":
        require_torch(version)
    extract_binaries(release.binary(device), device, renew=renew, force=force)
    ensure_system_files(device)
    label = version_label(version, device, release.cuda.release)
    build = (folder / "setup.py").read_bytes() + (folder / "pyproject.toml").read_bytes()
    editable(
        folder,
        f"{label} {zlib.crc32(build):08x}",
        # `empty` compiles nothing: the binaries are there already.
        env={"VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": label},
    )


def require_torch(version: str) -> None:
    """Raise if the host's torch is another than that for which the release's binaries are built."""
    with suppress(metadata.PackageNotFoundError):
        found, wanted = metadata.version("torch").split("+")[0], load().release(version).torch
        if found != wanted:
            other = load().built_for(found)
            use = f"use a release built for it: VLLM_VERSION={other}, or "
            raise WorkspaceError(
                f"this Python has torch {found}, the binaries of vLLM {version} are built for "
                f"{wanted}; {use if other else ''}set PYTHON= to one with torch {wanted}, or use a "
                "bundle (make bundle), which brings it"
            )


def install_kernels() -> None:
    editable(KERNELS, f"{zlib.crc32((KERNELS / 'pyproject.toml').read_bytes()):08x}")
