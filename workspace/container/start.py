# SPDX-License-Identifier: Apache-2.0
"""`make container`: what "Reopen in Container" does, without VS Code.

The container is made from devcontainer.json and has the labels by which VS Code and the
devcontainer CLI know theirs, so each of them finds what another made.
"""

from __future__ import annotations

from workspace import verbs
from workspace.container import config, image
from workspace.container.docker import docker, inspect, labels, show
from workspace.environment.device import device
from workspace.host import settings
from workspace.host.errors import WorkspaceError
from workspace.host.text import say


def find() -> dict | None:
    """The container of this checkout, None where there is none.

    Raises:
        WorkspaceError: there are several.
    """
    filters = [f"label={key}={value}" for key, value in config.labels().items()]
    command = ["ps", "--all", "--no-trunc", "--quiet"]
    for text in filters:
        command += ["--filter", text]
    found = docker(*command).split()
    if len(found) > 1:
        raise WorkspaceError(
            f"this checkout has {len(found)} containers: {', '.join(one[:12] for one in found)}; "
            "remove those that you do not need: docker rm -f <id>"
        )
    return inspect("container", found[0]) if found else None


def running() -> dict:
    """The container of this checkout, which has to run.

    Raises:
        WorkspaceError: it does not.
    """
    found = find()
    if found is None:
        raise WorkspaceError("this checkout has no container yet; run: make container")
    if not found["State"]["Running"]:
        raise WorkspaceError("this checkout's container is stopped; run: make container")
    return found


def create(name: str, network: str | None) -> str:
    """A new container of the image, running; returns its id. With the GPUs, where there are any.

    Raises:
        WorkspaceError: it did not start; it is removed again.
    """
    wanted = config.load()
    command = ["create", "--hostname", "vllm-kernels"]
    for key, value in config.labels().items():
        command += ["--label", f"{key}={value}"]
    for mount in wanted.mounts:
        command += ["--mount", mount]
    command += wanted.run_arguments
    command += ["--network", network] if network else []
    command += ["--gpus", "all"] if device() == "cuda" else []
    made = docker(*command, name, "sleep", "infinity", failure="the container could not be made")
    try:
        docker("start", made, failure="the container could not be started")
    except WorkspaceError:
        docker("rm", "--force", made)
        raise
    return made


def require_same_user(name: str, found: dict) -> None:
    """Raise where the image was made for another user than the one whose checkout this is."""
    made_for = labels(found).get(f"{image.PREFIX}.user")
    here = "{}:{}".format(*config.owner())
    if made_for not in (None, here):
        raise WorkspaceError(
            f"{name} is made for user and group {made_for}, but this checkout belongs to {here}, "
            "so its files could not be written in the container; build an image for it: "
            "make image, or give the checkout to that user"
        )


def run(options: verbs.Container) -> int:
    """Build the image if need be, start the container, set up what it holds."""
    name = options.image or image.ensure(options)
    wanted = inspect("image", name)
    if wanted is None:
        raise WorkspaceError(f"IMAGE={name} does not exist; make snapshots lists yours")
    require_same_user(name, wanted)
    found = find()
    if found and found["Image"] != wanted["Id"]:
        if not options.force:
            raise WorkspaceError(
                f"this checkout's container {found['Id'][:12]} is made from an older or another "
                f"image than {name}; what you installed in it goes with it, the checkout and the "
                "caches stay: make container FORCE=1 makes a new one"
            )
        say(f"removing container {found['Id'][:12]}")
        docker("rm", "--force", found["Id"])
        found = None
    if found is None:
        identity = create(name, options.network)
    else:
        identity = found["Id"]
        if not found["State"]["Running"]:
            docker("start", identity, failure="the container could not be started")
    say(f"container {identity[:12]} runs")
    command = config.load().after_creation
    chosen = settings.current()
    given = ["--env", f"VLLM_VERSION={chosen.version}"] if chosen.version else []
    given += ["--env", f"DEVICE={chosen.device}"] if chosen.device else []
    show("exec", *given, identity, "bash", "-c", command, failure=f"{command} in the container")
    say("make shell opens it; make shell CMD='make bench' runs one command in it")
    return 0
