# SPDX-License-Identifier: Apache-2.0
"""`make snapshot`: the running container as an image that starts without compiling anything.

    docker commit             what is in the container itself: environment, compiled kernels
    restore, in a container   what is only mounted there: checkout, fork's trees, compile caches
    docker commit             both, with what they are as labels and files
    scan                      configuration, history and layers, for credentials
    docker tag                only now has it a name

Before and after, credentials stop it: what a container holds, its image would hold for everybody
who gets it. Whatever ends it early, nothing with a name is left; what has none goes with the next
run.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import time
from collections.abc import Iterator
from typing import Any

from workspace import verbs
from workspace.container import config, image, restore, start
from workspace.container.docker import client, docker, inspect, labels
from workspace.credentials.content import listed
from workspace.credentials.files import search_paths
from workspace.credentials.image import search_configuration, search_image
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT
from workspace.host.text import say

REPOSITORY = "vllm-kernels-snapshot"
UNFINISHED = f"{image.PREFIX}.unfinished"
SNAPSHOT = f"{image.PREFIX}.snapshot"
"""The label by which snapshots are known; its value says what is in it, as JSON."""
BELOW = f"{image.PREFIX}.layers-below"
"""The label that says how many layers are those of the image that the container was made from."""
MOUNTED = "/mnt/checkout"
COMPILED = "/mnt/compiled"


def reference(tag: str | None) -> str:
    """TAG= as the name of an image: a name of its own where it has a colon or slash, else a tag
    of ours; without one, today's date and time."""
    tag = tag or time.strftime("%Y%m%d-%H%M%S")
    name = tag if re.search("[:/]", tag) else f"{REPOSITORY}:{tag}"
    if not re.fullmatch(r"[a-z0-9][a-z0-9._/:-]*:[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", name):
        raise WorkspaceError(
            f"TAG={tag} cannot name an image; use letters, digits, dots and dashes (TAG=tuned), "
            "or a whole name (TAG=registry/name:tag)"
        )
    return name


def remove_unfinished() -> None:
    """What snapshots left that were killed."""
    label = f"label={UNFINISHED}=yes"
    for left in docker("ps", "--all", "--quiet", "--filter", label).split():
        docker("rm", "--force", left)
    for left in docker("images", "--quiet", "--filter", "dangling=true", "--filter", label).split():
        docker("rmi", "--force", left)


def refuse_credentials(container: dict[str, Any]) -> list[str]:
    """Raise where the container's settings or files hold what must not get into an image; returns
    the files that can be left out of it without asking, such as a shell's history."""
    found = search_configuration({"Env": container["Config"]["Env"]})
    changed = docker("diff", container["Id"]).splitlines()
    found += search_paths(line[2:] for line in changed if line[0] in "AC")
    stays_out = [one.path for one in found if one.scrubbed]
    if held := [one for one in found if not one.scrubbed]:
        raise WorkspaceError(
            f"no snapshot was made: the container holds {listed(held)}. Settings "
            "stay out if they are given to make shell, not to the container (make container "
            "FORCE=1 makes a new one); files, if they are moved to /cache or removed"
        )
    if stays_out and not container["State"]["Running"]:
        raise WorkspaceError(
            f"the container is stopped, so {', '.join(stays_out)} could not be left out of the "
            "snapshot; start it: make container"
        )
    return stays_out


@contextlib.contextmanager
def without(container: str, paths: list[str]) -> Iterator[None]:
    """The container without these files, while it is committed. They are in its memory meanwhile:
    who kills this loses a history, and puts none into an image."""
    moves = [(shlex.quote(path), f"/dev/shm/aside-{n}") for n, path in enumerate(paths)]
    if paths:
        say(f"leaving out {', '.join(paths)}")
        away = " && ".join(f"mv {path} {aside}" for path, aside in moves)
        docker("exec", "--user", "0", container, "sh", "-c", away)
    try:
        yield
    finally:
        if paths:
            back = "; ".join(f"mv {aside} {path}" for path, aside in moves)
            docker("exec", "--user", "0", container, "sh", "-c", back)


def commit(container: str, labels: dict[str, str]) -> str:
    """`docker commit` under no name; the image's id."""
    changes = ['CMD ["bash"]', "ENTRYPOINT []", f"WORKDIR {config.load().folder}"]
    for key, value in labels.items():
        quoted = json.dumps(value).replace("$", "\\$")
        changes.append(f"LABEL {key}={quoted}")
    command = ["commit"]
    for change in changes:
        command += ["--change", change]
    return docker(*command, container, failure="the container could not be committed")


def restored(committed: str) -> tuple[str, dict[str, Any]]:
    """A container of the committed image in which the mounted things are real; its id, and what
    they are."""
    wanted = config.load()
    volume = wanted.volumes[str(restore.COMPILED)]
    command = ["create", "--network", "none", "--label", f"{UNFINISHED}=yes"]
    command += ["--mount", f"type=bind,source={ROOT},target={MOUNTED},readonly"]
    command += ["--mount", f"type=volume,source={volume},target={COMPILED},readonly"]
    # The devcontainer CLI starts its container by a shell, which a commit cannot take back.
    command += ["--workdir", MOUNTED, "--entrypoint", "", committed]
    made = docker(*command, "python3", "-B", "-m", restore.__name__, MOUNTED, COMPILED)
    try:
        told = docker("start", "--attach", made, failure="the checkout could not be taken along")
    except WorkspaceError:
        docker("rm", "--force", made)
        raise
    return made, json.loads(told)


def labels_of(found: dict[str, Any], below: list[str]) -> dict[str, str]:
    """What a finished snapshot says of itself."""
    return {
        BELOW: str(len(below)),
        UNFINISHED: "no",
        SNAPSHOT: json.dumps(found, separators=(",", ":")),
        "org.opencontainers.image.revision": found["workspace"]["commit"],
        "org.opencontainers.image.created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def disowned(container: dict[str, Any]) -> dict[str, str]:
    """The labels of the dev container, emptied: an image inherits them, and then each container of
    the snapshot would pass for the container of this checkout."""
    return {key: "" for key in labels(container) if key.startswith("devcontainer.")}


def scan(made: str, below: list[str]) -> None:
    """Raise where the image holds credentials: in its configuration, in its history, or in a layer
    that is not among those `below`."""
    if found := search_image(client(), made, below):
        raise WorkspaceError(
            f"the snapshot was removed: it would hold {listed(found)}; remove them "
            "from the container or the checkout, and run this again"
        )


def run(options: verbs.Snapshot) -> int:
    """Make a snapshot named by TAG=."""
    name = reference(options.tag)
    replaced = inspect("image", name)
    if replaced and not options.force:
        raise WorkspaceError(f"the image {name} exists; use another TAG=, or FORCE=1 to replace it")
    container = start.find()
    if container is None:
        raise WorkspaceError("this checkout has no container yet; run: make container")
    if (ROOT / ".git").is_file():
        raise WorkspaceError(
            "this checkout is a linked worktree, whose repository is elsewhere; make the snapshot "
            "from a clone"
        )
    remove_unfinished()
    stays_out = refuse_credentials(container)
    # The layers of the image that the container was made from; none known where that is gone.
    below = (inspect("image", container["Image"]) or {}).get("RootFS", {}).get("Layers", [])
    made: list[str] = []
    helpers: list[str] = []
    try:
        say("committing the container")
        with without(container["Id"], stays_out):
            made.append(commit(container["Id"], disowned(container) | {UNFINISHED: "yes"}))
        say("taking the checkout, the fork and what was compiled along")
        helper, found = restored(made[0])
        helpers.append(helper)
        made.append(commit(helper, labels_of(found, below)))
        say("looking for credentials in the image")
        scan(made[1], below)
        docker("tag", made[1], name)
        made.clear()
    finally:
        for one in helpers:
            docker("rm", "--force", one)
        for one in reversed(made):
            docker("rmi", "--force", one)
    if replaced:
        # Without --force: a container may still be made from it.
        with contextlib.suppress(WorkspaceError):
            docker("rmi", replaced["Id"])
    say(f"made {name}; make snapshot-verify TAG={name} proves it, docker run -it {name} opens it")
    return 0
