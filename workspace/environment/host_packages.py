# SPDX-License-Identifier: Apache-2.0
"""The packages of a host's Python in an environment that has a torch of its own, from a bundle.

What is compiled against the host's torch must not be imported beside the bundle's. So that
environment sees, instead of the host's folders, one folder of links for each, without torch, Triton
and what is linked with torch. torch's CUDA libraries that the bundle does not have are links to the
host's, in the folders where torch looks first (its RPATH): neither LD_LIBRARY_PATH nor a toolkit
that the loader knows precedes them.

Standard library only: this runs before there is an environment.
"""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

from workspace.environment.commands import run
from workspace.environment.inventory import installed_files, links_torch
from workspace.host.errors import WorkspaceError
from workspace.host.text import say, some

TORCH = frozenset({"torch", "torchgen", "functorch", "triton"})
"""What torch and Triton install."""
FOREIGN = (
    "import sys, sysconfig; inside = (sys.prefix, sysconfig.get_path('stdlib')); "
    "print(*(p for p in sys.path if p.startswith('/') and p != inside[1] and "
    "not p.startswith(inside[0])), sep='\\n')"
)
"""Prints the folders from which a Python imports, other than its environment's and its library."""


def has_torch(bundled: list[Path]) -> bool:
    """Whether a bundle's packages, as its requirement files name them, include torch."""
    return any("torch" in names(requirements) for requirements in bundled)


def names(requirements: Path) -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+)==", requirements.read_text(), re.MULTILINE))


def show(prefix: Path, packages: Path, host: list[Path], bundled: list[Path]) -> list[Path]:
    """Make the folders of links in place of the host's `host`, and link the CUDA libraries.

    Args:
        packages: the environment's folder of packages, with the bundle's.

    Raises:
        WorkspaceError: the bundle counts on a package of the host that is compiled for its torch.
    """
    folders: list[Path] = []
    hidden: dict[str, str] = {}
    for number, folder in enumerate(path for path in host if path.is_dir()):
        links = prefix / "host" / str(number)
        links.mkdir(parents=True)
        hidden |= _link(folder, links)
        folders.append(links)
    link_libraries(packages, host)
    brought = set[str]().union(*map(names, bundled))
    for requirements in bundled:
        kept = json.loads((requirements.parent / "manifest.json").read_text())["hosts_own"]
        if missing := sorted(hidden.keys() & kept.keys() - brought):
            raise WorkspaceError(
                f"the bundle counts on {some(missing)} of the host, compiled for another torch "
                "than the bundle's; pack one with a new inventory of the host"
            )
    if others := [f"{name} {hidden[name]}" for name in sorted(hidden.keys() - brought)]:
        say(f"compiled for the host's torch, so not in {prefix.name}: {some(others)}")
    return folders


def _link(folder: Path, links: Path) -> dict[str, str]:
    """Link what `folder` has; returns name and version of the distributions that are left out."""
    left_out = compiled_for_torch(folder)
    hidden: dict[str, str] = {}
    for distribution in metadata.distributions(path=[str(folder)]):
        entries = {name.split("/")[0] for name in installed_files(distribution)}
        if entries & left_out:
            left_out |= {entry for entry in entries if entry.endswith(".dist-info")}
            name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
            hidden[name] = distribution.version
    for path in folder.iterdir():
        if path.name not in left_out:
            (links / path.name).symlink_to(path)
    return hidden


def compiled_for_torch(folder: Path) -> set[str]:
    """torch, Triton, and the entries of a folder of packages that are linked with torch."""
    return {path.name for path in folder.iterdir() if path.name in TORCH or _links_torch(path)}


def _links_torch(path: Path) -> bool:
    files = path.rglob("*.so*") if path.is_dir() else (path,)
    return any(links_torch(str(file)) for file in files if ".so" in file.name)


def link_libraries(packages: Path, host: list[Path]) -> None:
    """Link the CUDA libraries of the host that the environment lacks."""
    own = {path.name for path in packages.glob("nvidia/*/lib/*")}
    for folder in host:
        for path in folder.glob("nvidia/*/lib/*.so*"):
            if path.name not in own:
                own.add(path.name)
                link = packages / path.relative_to(folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)


def require_one_torch(interpreter: Path, python: str) -> None:
    """Raise if the environment sees, by a path that a package of the host adds, something that is
    compiled for the host's torch."""
    for folder in run([str(interpreter), "-I", "-c", FOREIGN], quiet=True).splitlines():
        if Path(folder).is_dir() and (found := compiled_for_torch(Path(folder))):
            raise WorkspaceError(
                f"{folder}, which a .pth file of {python} adds, has {some(sorted(found))} for "
                "another torch than the bundle's; take it out there, or set PYTHON= to another one"
            )
