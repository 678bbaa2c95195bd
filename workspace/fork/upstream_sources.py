# SPDX-License-Identifier: Apache-2.0
"""The sources that upstream's build fetches from the network, read from the tree's cmake files.

Repositories, tags and the variables for local copies differ between releases, so none of them is
written here. Before anything is compiled, each source without a local copy that was not fetched yet
is checked with git, so that the user's proxies and rewrites count.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from workspace.host.errors import WorkspaceError
from workspace.host.git import as_user, git
from workspace.host.paths import ROOT
from workspace.host.text import say
from workspace.pins.model import Device

TIMEOUT = 8
"""Seconds to wait for the answer of a repository."""

_COMMENT = re.compile(r"#.*")
_COMMAND = re.compile(
    r"\b(?P<name>if|elseif|else|endif|set|FetchContent_Declare|FetchContent_Populate)\s*"
    r"\((?P<arguments>(?:[^()\"]|\"[^\"]*\"|\((?:[^()]|\([^()]*\))*\))*)\)",
    re.IGNORECASE,
)
_LOCAL = re.compile(r"ENV\{(\w+_SRC_DIR|\w+_ROOT_DIR|FETCHCONTENT_SOURCE_DIR_\w+)\}")


@dataclass(frozen=True)
class Source:
    """A source that the build fetches, or uses from the folder in `variable`."""

    name: str
    repository: str
    tag: str
    variable: str

    def local(self) -> Path | None:
        """The folder that the user set.

        Raises:
            WorkspaceError: the folder does not exist or is empty (cmake would fetch into it).
        """
        value = os.environ.get(self.variable)
        if not value:
            return None
        folder = Path(value).resolve()
        if not folder.is_dir() or not any(folder.iterdir()):
            state = "an empty folder" if folder.is_dir() else "not a folder"
            raise WorkspaceError(
                f"{self.variable}={value} is {state}; set it to a checkout of {self.repository} at "
                f"{self.tag}, or leave it out to have the source fetched"
            )
        return folder

    def fetched(self, base: Path) -> bool:
        """Whether an earlier build fetched it, at this tag, into the folder that cmake uses."""
        folder = base / f"{self.name.lower()}-src"
        if not (folder / ".git").exists():
            return False
        commits = git("rev-parse", "HEAD", f"{self.tag}^{{commit}}", tree=folder, check=False)
        return len(set(commits.split())) == 1

    def reachable(self) -> bool:
        return bool(as_user("ls-remote", self.repository, "HEAD", tree=ROOT, timeout=TIMEOUT))


def _applies(conditions: list[tuple[str, bool]], machine: str) -> bool:
    """Whether a declaration inside these conditions applies to the machine.

    Only one condition matters: upstream uses other sources on an Arm CPU (ASIMD).
    """
    asimd = [is_true for text, is_true in conditions if re.match(r"\(*\s*ASIMD_FOUND\b", text)]
    return all(is_true == (machine == "aarch64") for is_true in asimd)


def read(text: str, machine: str) -> list[Source]:
    """The sources that a cmake file declares for a machine."""
    text = _COMMENT.sub("", text)
    variables: dict[str, str] = {}
    conditions: list[tuple[str, bool]] = []
    declared = []
    for match in _COMMAND.finditer(text):
        name, arguments = match["name"].lower(), match["arguments"]
        if name == "if":
            conditions.append((arguments.strip(), True))
        elif name == "elseif":
            conditions[-1] = (arguments.strip(), True)
        elif name == "else":
            conditions[-1] = (conditions[-1][0], False)
        elif name == "endif":
            conditions.pop()
        words = [
            re.sub(r"\$\{(\w+)\}", lambda known: variables.get(known[1], known[0]), word.strip('"'))
            for word in re.findall(r'"[^"]*"|\S+', arguments)
        ]
        if name == "set" and len(words) == 2:
            variables[words[0]] = words[1]
        if not name.startswith("fetchcontent") or "GIT_REPOSITORY" not in words:
            continue
        if _applies(conditions, machine):
            after = dict(pairwise(words))
            local = _LOCAL.findall(text, 0, match.start())
            variable = local[-1] if local else f"FETCHCONTENT_SOURCE_DIR_{words[0].upper()}"
            declared.append(Source(words[0], after["GIT_REPOSITORY"], after["GIT_TAG"], variable))
    return declared


def sources(tree: Path, device: Device, machine: str) -> list[Source]:
    """Everything that a build for `device` fetches, in cmake's order."""
    files = [tree / "CMakeLists.txt", *sorted((tree / "cmake").rglob("*.cmake"))]
    for_cpu = tree / "cmake" / "cpu_extension.cmake"
    return [
        source
        for path in files
        if (path == for_cpu) == (device == "cpu")
        for source in read(path.read_text(), machine)
    ]


def require(tree: Path, device: Device, machine: str, base: Path) -> dict[str, str]:
    """The variables for local copies, with absolute paths, for the environment of cmake.

    Raises:
        WorkspaceError: a variable is wrong, or sources have no local copy and cannot be reached;
            these were printed, with the variable of each.
    """
    needed = sources(tree, device, machine)
    local = {source.variable: str(folder) for source in needed if (folder := source.local())}
    remote = [one for one in needed if one.variable not in local and not one.fetched(base)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        reachable = list(pool.map(Source.reachable, remote))
    missing = [source for source, ok in zip(remote, reachable, strict=True) if not ok]
    if not missing:
        return local
    say("upstream's build fetches sources that this machine cannot reach:")
    for source in missing:
        say(f"  {source.name} {source.tag} from {source.repository}: {source.variable}=<folder>")
    raise WorkspaceError(
        f"{len(missing)} of {len(needed)} sources are missing; nothing was compiled. Build where "
        f"they can be fetched, or set a folder for each, e.g. {missing[0].variable}=<folder>"
    )
