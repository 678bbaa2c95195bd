# SPDX-License-Identifier: Apache-2.0
"""uv at its pinned version, in the tools folder."""

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
from workspace.pins import release


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
    """The name of the wheel in the cache."""
    return f"uv-{version}.whl"


def cached_wheel(sha256: str) -> Path:
    """Where the wheel with this sha256 is in the cache, if it was fetched."""
    return cache_folder(sha256) / wheel_name(release.pins()["uv"]["version"])


def _fetch(python: str, version: str, sha256: str) -> Path:
    """The wheel, from the cache or through pip, which has the index settings of the user."""
    cached = cached_wheel(sha256)
    if cached.exists() and hashlib.sha256(cached.read_bytes()).hexdigest() == sha256:
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as work:
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


def pinned_sha256(machine: str) -> str:
    """The sha256 of the pinned wheel.

    Raises:
        WorkspaceError: none is pinned for that machine.
    """
    pinned = release.pins()["uv"]["sha256"]
    if machine not in pinned:
        raise WorkspaceError(f"pins.toml has no uv for {machine}; add its sha256 under [uv]")
    return pinned[machine]


def obtain(python: str) -> Path:
    """The pinned uv; fetched with the pip of `python` if needed."""
    version = release.pins()["uv"]["version"]
    binary = binary_path(version)
    if binary.exists():
        return binary
    with zipfile.ZipFile(_fetch(python, version, pinned_sha256(platform.machine()))) as archive:
        member = next(name for name in archive.namelist() if name.endswith("/scripts/uv"))
        write_file(binary, archive.read(member), mode=0o755)
    return binary
