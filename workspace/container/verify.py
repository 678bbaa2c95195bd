# SPDX-License-Identifier: Apache-2.0
"""`make snapshot-verify`: a snapshot starts, holds what its labels say, and compiles nothing.

`self_test` runs in a container of the snapshot, without a network or mounts.
"""

from __future__ import annotations

from workspace import verbs
from workspace.container.docker import client, docker, inspect_image, show
from workspace.container.snapshot import BELOW, SNAPSHOT, reference
from workspace.credentials.content import listed
from workspace.credentials.image import search_image
from workspace.host.errors import WorkspaceError
from workspace.host.settings import device
from workspace.host.text import say


def run(options: verbs.SnapshotVerify) -> int:
    """Verify the snapshot TAG=."""
    if not options.tag:
        raise WorkspaceError("name the snapshot: TAG=<name>; make snapshots lists them")
    name = reference(options.tag)
    snapshot = inspect_image(name)
    if snapshot is None:
        raise WorkspaceError(f"there is no image {name}; make snapshots lists yours")
    record = snapshot.labels.get(SNAPSHOT)
    if not record:
        raise WorkspaceError(f"{name} is not a snapshot of this workspace")
    say(f"starting {name} without a network and without mounts")
    gpus = ["--gpus", "all"] if device() == "cuda" else []
    container = docker(
        "create", "--network", "none", "--shm-size", "2g", *gpus, name,
        "python3", "-m", "workspace.container.self_test", record,
    )  # fmt: skip
    try:
        show("start", "--attach", container, failure=f"{name} is not what its labels say")
    finally:
        docker("rm", "--force", container)
    say("searching it for credentials")
    below = snapshot.layers[: int(snapshot.labels.get(BELOW, 0))]
    if found := search_image(client(), name, below):
        raise WorkspaceError(f"{name} holds {listed(found)}; remove it: docker rmi {name}")
    say(f"{name} is complete and holds no credentials that were found")
    return 0
