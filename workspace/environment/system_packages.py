# SPDX-License-Identifier: Apache-2.0
"""Files of packages of the Linux distribution, without installing them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from workspace.environment.commands import run
from workspace.host.errors import WorkspaceError
from workspace.host.paths import TOOLS
from workspace.host.text import say


def unpack(package: str, why: str) -> Path:
    """A folder with the files of a Debian or Ubuntu package, under the tools folder.

    apt needs no root here, because its lists and cache are in a folder of ours.

    Raises:
        WorkspaceError: no apt, or apt cannot get the package; begins with `why` and names what to
            install.
    """
    folder = TOOLS / package
    if folder.exists():
        return folder
    remedy = f"{why}; install your distribution's {package} (Debian, Ubuntu: apt-get install it)"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise WorkspaceError(remedy)
    say(f"{why}: unpacking the distribution's {package} (nothing is installed)")
    TOOLS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TOOLS, prefix="apt-") as work:
        for name in ("lists/partial", "cache/archives/partial", "files"):
            (Path(work) / name).mkdir(parents=True)
        apt = ["apt-get", "-qq", "-o", f"Dir::State::Lists={work}/lists"]
        apt += ["-o", f"Dir::Cache={work}/cache", "-o", "APT::Sandbox::User="]
        run([*apt, "update"], quiet=True, failure=remedy)
        run([*apt, "download", package], quiet=True, cwd=work, failure=remedy)
        (archive,) = Path(work).glob("*.deb")
        run(["dpkg-deb", "-x", str(archive), f"{work}/files"], quiet=True)
        (Path(work) / "files").replace(folder)
    return folder
