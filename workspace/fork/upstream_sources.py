# SPDX-License-Identifier: Apache-2.0
"""What upstream's build fetches from the net, read out of the tree's own cmake files.

Which sources, from where, at which tag and under which variable a local copy is taken differs
from release to release, so nothing of it is written down here. Before anything is compiled, each
source that is neither given nor fetched already is asked for once, with git itself, so that its
proxies and rewrites count.
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
"""Seconds that a source has to answer."""

_COMMENT = re.compile(r"#.*")
_COMMAND = re.compile(
    r"\b(?P<name>if|elseif|else|endif|set|FetchContent_Declare|FetchContent_Populate)\s*"
    r"\((?P<arguments>(?:[^()\"]|\"[^\"]*\"|\((?:[^()]|\([^()]*\))*\))*)\)",
    re.IGNORECASE,
)
_LOCAL = re.compile(r"ENV\{(\w+_SRC_DIR|\w+_ROOT_DIR|FETCHCONTENT_SOURCE_DIR_\w+)\}")


@dataclass(frozen=True)
class Source:
    """One source that the build fetches, or takes from the folder that `variable` names."""

    name: str
    repository: str
    tag: str
    variable: str

    def local(self) -> Path | None:
        """The folder that the user gave.

        Raises:
            WorkspaceError: there is no such folder, or nothing is in it (which cmake would take
                for a source that is still to be fetched).
        """
        given = os.environ.get(self.variable)
        if not given:
            return None
        folder = Path(given).resolve()
        if not folder.is_dir() or not any(folder.iterdir()):
            state = "an empty folder" if folder.is_dir() else "not a folder"
            raise WorkspaceError(
                f"{self.variable}={given} is {state}; give a checkout of {self.repository} at "
                f"{self.tag}, or leave the variable out to have it fetched"
            )
        return folder

    def fetched(self, base: Path) -> bool:
        """Whether an earlier build left it, at this tag, under the folder where cmake puts it."""
        folder = base / f"{self.name.lower()}-src"
        if not (folder / ".git").exists():
            return False
        ends = git("rev-parse", "HEAD", f"{self.tag}^{{commit}}", tree=folder, check=False)
        return len(set(ends.split())) == 1

    def reachable(self) -> bool:
        return bool(as_user("ls-remote", self.repository, "HEAD", tree=ROOT, timeout=TIMEOUT))


def _applies(conditions: list[tuple[str, bool]], machine: str) -> bool:
    """Whether a declaration counts here, by the conditions around it.

    Only one matters: upstream takes other sources where the CPU is an Arm (ASIMD).
    """
    arm = machine == "aarch64"
    return all(
        holds == arm
        for condition, holds in conditions
        if re.match(r"\(*\s*ASIMD_FOUND\b", condition)
    )  # fmt: skip


def read(text: str, machine: str) -> list[Source]:
    """The sources that one cmake file declares for this machine."""
    text = _COMMENT.sub("", text)
    variables: dict[str, str] = {}
    conditions: list[tuple[str, bool]] = []
    found = []
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
            following = dict(pairwise(words))
            named = _LOCAL.findall(text, 0, match.start())
            variable = named[-1] if named else f"FETCHCONTENT_SOURCE_DIR_{words[0].upper()}"
            found.append(
                Source(words[0], following["GIT_REPOSITORY"], following["GIT_TAG"], variable)
            )
    return found


def sources(tree: Path, device: Device, machine: str) -> list[Source]:
    """Everything that a build for `device` fetches, in the order in which cmake gets to it."""
    files = [tree / "CMakeLists.txt", *sorted((tree / "cmake").rglob("*.cmake"))]
    for_cpu = tree / "cmake" / "cpu_extension.cmake"
    return [
        source
        for path in files
        if (path == for_cpu) == (device == "cpu")
        for source in read(path.read_text(), machine)
    ]


def require(tree: Path, device: Device, machine: str, base: Path) -> dict[str, str]:
    """The variables that point to local copies, as full paths for cmake's environment.

    Raises:
        WorkspaceError: a variable points nowhere, or a source can neither be found nor reached;
            which ones, and the variable of each, is said before.
    """
    wanted = sources(tree, device, machine)
    given = {source.variable: str(folder) for source in wanted if (folder := source.local())}
    needed = [one for one in wanted if one.variable not in given and not one.fetched(base)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        answers = list(pool.map(Source.reachable, needed))
    missing = [source for source, answered in zip(needed, answers, strict=True) if not answered]
    if not missing:
        return given
    say("upstream's build fetches sources that cannot be reached from here:")
    for source in missing:
        say(f"  {source.name} {source.tag} from {source.repository}: {source.variable}=<folder>")
    have = ", ".join(one.name for one in wanted if one not in missing)
    raise WorkspaceError(
        f"{len(missing)} of {len(wanted)} sources are missing"
        + (f" (there: {have})" if have else "")
        + "; nothing was compiled. Build where they can be fetched, or give each as a folder, e.g. "
        f"{missing[0].variable}=<folder>"
    )
