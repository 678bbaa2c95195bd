# SPDX-License-Identifier: Apache-2.0
"""The Python with which an environment is created."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from workspace.host import settings
from workspace.host.errors import WorkspaceError
from workspace.host.paths import PINS


def version_of(python: str) -> str | None:
    """'3.12' for a working interpreter, else None (a pyenv shim may not work)."""
    probe = "import sys; print('%d.%d' % sys.version_info[:2])"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(
            [python, "-c", probe], capture_output=True, text=True, timeout=30, check=False
        )
        if result.returncode == 0:
            return result.stdout.strip()
    return None


def supported_versions() -> list[str]:
    """The versions in pins.toml, preferred first; read without tomllib, which 3.10 lacks."""
    for line in PINS.read_text().splitlines():
        if line.startswith("supported = ["):
            return list(json.loads(line.split("=", 1)[1].split("#")[0]))
    raise WorkspaceError(f"{PINS} names no supported Python; run: git checkout pins.toml")


def find_python() -> str:
    """PYTHON= if given, else the most preferred supported version on PATH or under pyenv."""
    supported = supported_versions()
    if chosen := settings.current().python:
        path = shutil.which(chosen)
        version = version_of(path) if path else None
        if path is None or version not in supported:
            kind = f"Python {version}" if version else "not a working Python"
            raise WorkspaceError(
                f"PYTHON={chosen} is {kind}; use one of Python {', '.join(sorted(supported))}"
            )
        return path
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for version in supported:
        candidates = [shutil.which(f"python{version}"), shutil.which("python3"), sys.executable]
        candidates += [str(p / "bin" / "python") for p in sorted(pyenv.glob(f"{version}.*"))]
        for candidate in candidates:
            if candidate and version_of(candidate) == version:
                return candidate
    raise WorkspaceError(
        f"no Python {', '.join(sorted(supported))} found (this is {platform.python_version()}); "
        "install one, on Debian and Ubuntu: apt-get install python3, or set PYTHON=<path>"
    )
