# SPDX-License-Identifier: Apache-2.0
"""`make snapshot-verify`: a snapshot starts, holds what its labels say, and compiles nothing.

What is proved is in `self_test`, which runs in a container of the snapshot: no network, nothing
mounted.
"""

from __future__ import annotations

from workspace import verbs
from workspace.container.docker import client, docker, inspect, labels, show
from workspace.container.snapshot import BELOW, SNAPSHOT, reference
from workspace.credentials.content import listed
from workspace.credentials.image import search_image
from workspace.environment.device import device
from workspace.host.errors import WorkspaceError
from workspace.host.text import say


def run(options: verbs.SnapshotVerify) -> int:
    """Prove the snapshot TAG=."""
    if not options.tag:
        raise WorkspaceError("which snapshot? TAG=<name>; make snapshots lists them")
    name = reference(options.tag)
    there = inspect("image", name)
    if there is None:
        raise WorkspaceError(f"there is no image {name}; make snapshots lists yours")
    told = labels(there).get(SNAPSHOT)
    if not told:
        raise WorkspaceError(f"{name} is not a snapshot of this workspace")
    say(f"starting {name} without a network and without mounts")
    gpus = ["--gpus", "all"] if device() == "cuda" else []
    made = docker(
        "create", "--network", "none", "--shm-size", "2g", *gpus, name,
        "python3", "-m", "workspace.container.self_test", told,
    )  # fmt: skip
    try:
        show("start", "--attach", made, failure=f"{name} does not hold what it should")
    finally:
        docker("rm", "--force", made)
    say("searching it for credentials")
    below = int(labels(there).get(BELOW, 0))
    if found := search_image(client(), name, there["RootFS"]["Layers"][:below]):
        raise WorkspaceError(f"{name} holds {listed(found)}; remove it: docker rmi {name}")
    say(f"{name} is whole, and no credentials were found in it")
    return 0
