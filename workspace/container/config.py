# SPDX-License-Identifier: Apache-2.0
"""devcontainer.json, the one description of the container, as this machine fills it in."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass

from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT

FILE = ROOT / ".devcontainer" / "devcontainer.json"


@dataclass(frozen=True)
class Config:
    """The arguments of `docker run`; see the specification of development containers."""

    image: str
    folder: str
    """Where the checkout is in the container."""
    mounts: list[str]
    """As for `docker run --mount`; the checkout's is the first."""
    run_arguments: list[str]
    after_creation: str

    @property
    def volumes(self) -> dict[str, str]:
        """Folder in the container → name of the volume."""
        parts = [dict(part.split("=", 1) for part in mount.split(",")) for mount in self.mounts]
        return {part["target"]: part["source"] for part in parts if part["type"] == "volume"}


def _substitute(text: str) -> str:
    def value(found: re.Match[str]) -> str:
        kind, _, name = found[1].partition(":")
        if kind == "localWorkspaceFolder":
            return str(ROOT)
        if kind == "localEnv":
            return os.environ.get(name, "")
        raise WorkspaceError(f"{FILE} uses ${{{found[1]}}}, which make container does not know")

    return re.sub(r"\$\{([^}]+)\}", value, text)


def load() -> Config:
    """Read devcontainer.json.

    Raises:
        WorkspaceError: it does not exist, is not JSON with comments on lines of their own, or has
            a variable that only VS Code fills in; or the checkout's path cannot be mounted.
    """
    if found := re.search('[,"]', str(ROOT)):
        raise WorkspaceError(
            f"{ROOT} has a {found[0]} in its path, which Docker's mounts cannot hold; move the "
            "checkout to another folder"
        )
    try:
        document = json.loads(re.sub(r"^\s*//.*$", "", FILE.read_text(), flags=re.MULTILINE))
    except (OSError, ValueError) as error:
        raise WorkspaceError(f"{FILE} cannot be read: {error}") from None
    arguments = list(document["runArgs"])
    return Config(
        image=document["image"],
        folder=document["workspaceFolder"],
        mounts=[_substitute(text) for text in [document["workspaceMount"], *document["mounts"]]],
        run_arguments=["--init", *arguments] if document.get("init") else arguments,
        after_creation=document["postCreateCommand"],
    )


def labels() -> dict[str, str]:
    """The labels by which VS Code and the devcontainer CLI find the container of a checkout."""
    return {"devcontainer.local_folder": str(ROOT), "devcontainer.config_file": str(FILE)}


def owner() -> tuple[int, int]:
    """User and group id of the container's user: those of the checkout's owner, so that files
    written on either side can be edited on the other."""
    status = ROOT.stat()
    return status.st_uid, status.st_gid
