# SPDX-License-Identifier: Apache-2.0
"""`make snapshot`: the running container as an image that starts without compiling anything.

    docker commit             what is in the container itself: environment, compiled kernels
    restore, in a container   what is only mounted there: checkout, fork's trees, compile caches
    docker commit             both, described by labels and files
    search                    configuration, history and layers, for credentials
    docker tag                only now

Credentials in the container or in the new image end it: everybody who gets the image would have
them. However it ends early, nothing tagged is left; the next run removes what is untagged.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import time
from collections.abc import Iterator

from workspace import verbs
from workspace.container import config, image, restore, start
from workspace.container.docker import Container, client, docker, inspect_image
from workspace.credentials.content import listed
from workspace.credentials.files import search_paths
from workspace.credentials.image import search_configuration, search_image
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT
from workspace.host.text import say

REPOSITORY = "vllm-kernels-snapshot"
UNFINISHED = f"{image.PREFIX}.unfinished"
SNAPSHOT = f"{image.PREFIX}.snapshot"
"""The label of every snapshot; its value describes the contents, as JSON."""
BELOW = f"{image.PREFIX}.layers-below"
"""The label with the number of layers that are those of the container's own image."""
MOUNTED = "/mnt/checkout"
COMPILED = "/mnt/compiled"


def reference(tag: str | None) -> str:
    """TAG= as the name of an image: a whole name if it has a colon or slash, else a tag of
    REPOSITORY, by default the date and time."""
    tag = tag or time.strftime("%Y%m%d-%H%M%S")
    name = tag if re.search("[:/]", tag) else f"{REPOSITORY}:{tag}"
    if not re.fullmatch(r"[a-z0-9][a-z0-9._/:-]*:[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", name):
        raise WorkspaceError(
            f"TAG={tag} cannot name an image; use letters, digits, dots and dashes (TAG=tuned), "
            "or a whole name (TAG=registry/name:tag)"
        )
    return name


def remove_unfinished() -> None:
    """Remove the containers and images of snapshots that were killed."""
    label = f"label={UNFINISHED}=yes"
    for container in docker("ps", "--all", "--quiet", "--filter", label).split():
        docker("rm", "--force", container)
    command = ("images", "--quiet", "--filter", "dangling=true", "--filter", label)
    for untagged in docker(*command).split():
        docker("rmi", "--force", untagged)


def refuse_credentials(container: Container) -> list[str]:
    """Raise if the container's settings or files hold credentials; returns the files that can be
    left out of the image without asking, such as a shell's history."""
    findings = search_configuration({"Env": container.environment})
    changed = docker("diff", container.identity).splitlines()
    findings += search_paths(line[2:] for line in changed if line[0] in "AC")
    left_out = [finding.path for finding in findings if finding.scrubbed]
    if credentials := [finding for finding in findings if not finding.scrubbed]:
        raise WorkspaceError(
            f"no snapshot was made: the container holds {listed(credentials)}. Pass settings to "
            "make shell, not to the container (make container FORCE=1 makes a new one); move files "
            "to /cache, or remove them"
        )
    if left_out and not container.running:
        raise WorkspaceError(
            f"the container is stopped, so {', '.join(left_out)} could not be left out of the "
            "snapshot; start it: make container"
        )
    return left_out


@contextlib.contextmanager
def without(container: str, paths: list[str]) -> Iterator[None]:
    """Move these files to the container's memory while it is committed: if this is killed, a
    history is lost, and none gets into an image."""
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


def restored(committed: str) -> tuple[str, restore.Record]:
    """Copy what is mounted into a container of the committed image; its id, and what it holds."""
    volume = config.load().volumes[str(restore.COMPILED)]
    command = ["create", "--network", "none", "--label", f"{UNFINISHED}=yes"]
    command += ["--mount", f"type=bind,source={ROOT},target={MOUNTED},readonly"]
    command += ["--mount", f"type=volume,source={volume},target={COMPILED},readonly"]
    # The devcontainer CLI sets a shell as the entry point, which a commit does not reset.
    command += ["--workdir", MOUNTED, "--entrypoint", "", committed]
    created = docker(*command, "python3", "-B", "-m", restore.__name__, MOUNTED, COMPILED)
    try:
        record = docker("start", "--attach", created, failure="the checkout could not be copied")
    except WorkspaceError:
        docker("rm", "--force", created)
        raise
    return created, json.loads(record)


def labels_of(record: restore.Record, below: list[str]) -> dict[str, str]:
    """The labels of a finished snapshot."""
    return {
        BELOW: str(len(below)),
        UNFINISHED: "no",
        SNAPSHOT: json.dumps(record, separators=(",", ":")),
        "org.opencontainers.image.revision": record["workspace"]["commit"],
        "org.opencontainers.image.created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def run(options: verbs.Snapshot) -> int:
    """Make a snapshot named by TAG=."""
    name = reference(options.tag)
    replaced = inspect_image(name)
    if replaced and not options.force:
        raise WorkspaceError(f"the image {name} exists; use another TAG=, or FORCE=1 to replace it")
    container = start.require()
    if (ROOT / ".git").is_file():
        raise WorkspaceError(
            "this checkout is a linked worktree, whose repository is elsewhere; make the snapshot "
            "from a clone"
        )
    remove_unfinished()
    left_out = refuse_credentials(container)
    base = inspect_image(container.image)  # None if it was removed
    below = base.layers if base else []
    # An image inherits labels. Emptied, no container of the snapshot passes for this checkout's.
    emptied = {key: "" for key in container.labels if key.startswith("devcontainer.")}
    with contextlib.ExitStack() as cleanup:
        say("committing the container")
        with without(container.identity, left_out):
            committed = commit(container.identity, emptied | {UNFINISHED: "yes"})
        cleanup.callback(docker, "rmi", "--force", committed)
        say("copying the checkout, the fork and compiled files into it")
        helper, record = restored(committed)
        cleanup.callback(docker, "rm", "--force", helper)
        snapshot = commit(helper, labels_of(record, below))
        cleanup.callback(docker, "rmi", "--force", snapshot)
        say("searching the image for credentials")
        if found := search_image(client(), snapshot, below):
            raise WorkspaceError(
                f"the snapshot was removed: it would hold {listed(found)}; remove them from the "
                "container or the checkout and re-run"
            )
        docker("tag", snapshot, name)
        cleanup.pop_all()
        docker("rm", "--force", helper)
    if replaced:
        # Without --force: it may still have a container.
        with contextlib.suppress(WorkspaceError):
            docker("rmi", replaced.identity)
    say(f"made {name}; verify it: make snapshot-verify TAG={name}; open it: docker run -it {name}")
    return 0
