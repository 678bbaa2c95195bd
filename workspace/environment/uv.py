# SPDX-License-Identifier: Apache-2.0
"""uv at its pinned version."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import tempfile
import zipfile
from pathlib import Path

from workspace.environment import system_packages
from workspace.environment.commands import INDEX_REMEDY, run
from workspace.host.errors import WorkspaceError
from workspace.host.files import write_file
from workspace.host.paths import TOOLS, cache_folder
from workspace.host.text import say


def _pip_command(python: str) -> list[str]:
    has_pip = subprocess.run([python, "-c", "import pip"], capture_output=True, check=False)
    if has_pip.returncode == 0:
        return [python, "-m", "pip"]
    # The bare python3 of Debian and Ubuntu has neither pip nor ensurepip; their venv has.
    why = "this Python has no pip, which is needed once to fetch uv"
    folder = system_packages.unpack("python3-pip-whl", why)
    (wheel,) = folder.glob("usr/share/python-wheels/pip-*.whl")
    return [python, str(wheel / "pip")]


def wheel_name(version: str) -> str:
    """Its name in the cache."""
    return f"uv-{version}.whl"


def _fetch_uv(python: str, version: str, sha256: str) -> Path:
    """The wheel of uv, from the cache or through pip (and so the user's index settings)."""
    folder = cache_folder(sha256)
    cached = folder / wheel_name(version)
    if cached.exists() and hashlib.sha256(cached.read_bytes()).hexdigest() == sha256:
        return cached
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        requirement = Path(work) / "uv.txt"
        requirement.write_text(f"uv=={version} --hash=sha256:{sha256}\n")
        say(f"fetching uv {version}")
        run(
            [*_pip_command(python), "download", "-q", "--no-deps", "--only-binary=:all:",
             "--require-hashes", "-r", str(requirement), "-d", work],
            quiet=True,
            failure=f"uv {version} could not be fetched; {INDEX_REMEDY}",
        )  # fmt: skip
        (wheel,) = Path(work).glob("*.whl")
        wheel.replace(cached)
    return cached


def binary_path(version: str) -> Path:
    return TOOLS / f"uv-{version}" / "uv"


def pinned_sha256(pins: dict, machine: str) -> str:
    """Of the wheel of the pinned uv.

    Raises:
        WorkspaceError: none is pinned for that machine.
    """
    if machine not in pins["uv"]["sha256"]:
        raise WorkspaceError(f"pins.toml has no uv for {machine}; add its sha256 under [uv]")
    return str(pins["uv"]["sha256"][machine])


def obtain(python: str, pins: dict) -> Path:
    """The pinned uv, in the checkout's own tools."""
    version = pins["uv"]["version"]
    binary = binary_path(version)
    if binary.exists():
        return binary
    sha256 = pinned_sha256(pins, platform.machine())
    with zipfile.ZipFile(_fetch_uv(python, version, sha256)) as archive:
        member = next(name for name in archive.namelist() if name.endswith("/scripts/uv"))
        write_file(binary, archive.read(member), mode=0o755)
    return binary
