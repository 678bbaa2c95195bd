# SPDX-License-Identifier: Apache-2.0
"""`make container`: what "Reopen in Container" does, without VS Code.

The container is created from devcontainer.json, with the labels by which VS Code and the
devcontainer CLI find theirs, so each of them finds what another created.
"""

from __future__ import annotations

from workspace import verbs
from workspace.container import config, image
from workspace.container.docker import (
    Container,
    Image,
    docker,
    inspect_container,
    inspect_image,
    show,
)
from workspace.host import settings
from workspace.host.errors import WorkspaceError
from workspace.host.settings import device
from workspace.host.text import say

START_FAILED = "the container could not be started"


def find() -> Container | None:
    """The container of this checkout; None if there is none.

    Raises:
        WorkspaceError: there are several.
    """
    command = ["ps", "--all", "--no-trunc", "--quiet"]
    for key, value in config.labels().items():
        command += ["--filter", f"label={key}={value}"]
    identities = docker(*command).split()
    if len(identities) > 1:
        names = ", ".join(identity[:12] for identity in identities)
        raise WorkspaceError(
            f"this checkout has {len(identities)} containers: {names}; remove those that you do "
            "not need: docker rm -f <id>"
        )
    return inspect_container(identities[0]) if identities else None


def require() -> Container:
    """The container of this checkout.

    Raises:
        WorkspaceError: there is none.
    """
    container = find()
    if container is None:
        raise WorkspaceError("this checkout has no container yet; run: make container")
    return container


def running() -> Container:
    """The running container of this checkout.

    Raises:
        WorkspaceError: there is none, or it is stopped.
    """
    container = require()
    if not container.running:
        raise WorkspaceError("this checkout's container is stopped; run: make container")
    return container


def create(name: str, network: str | None) -> str:
    """Create and start a container of the image, with this machine's GPUs; returns its id.

    Raises:
        WorkspaceError: it did not start, and was removed.
    """
    description = config.load()
    command = ["create", "--hostname", "vllm-kernels"]
    for key, value in config.labels().items():
        command += ["--label", f"{key}={value}"]
    for mount in description.mounts:
        command += ["--mount", mount]
    command += description.run_arguments
    command += ["--network", network] if network else []
    command += ["--gpus", "all"] if device() == "cuda" else []
    created = docker(
        *command, name, "sleep", "infinity", failure="the container could not be created"
    )
    try:
        docker("start", created, failure=START_FAILED)
    except WorkspaceError:
        docker("rm", "--force", created)
        raise
    return created


def require_same_user(name: str, built: Image) -> None:
    """Raise where the image was built for another user than the checkout's owner."""
    user = built.labels.get(f"{image.PREFIX}.user")
    owner = "{}:{}".format(*config.owner())
    if user not in (None, owner):
        raise WorkspaceError(
            f"{name} is built for user and group {user}, but this checkout belongs to {owner}, so "
            "its files could not be written in the container; build an image for it: make image, "
            "or give the checkout to that user"
        )


def run(options: verbs.Container) -> int:
    """Build the image if need be, start the container, set it up."""
    name = options.image or image.ensure(options)
    built = inspect_image(name)
    if built is None:
        raise WorkspaceError(f"IMAGE={name} does not exist; make snapshots lists yours")
    require_same_user(name, built)
    container = find()
    if container and container.image != built.identity:
        if not options.force:
            raise WorkspaceError(
                f"this checkout's container {container.identity[:12]} is of an older or another "
                f"image than {name}. make container FORCE=1 makes a new one; what you installed in "
                "the container is lost then, the checkout and the caches stay"
            )
        say(f"removing container {container.identity[:12]}")
        docker("rm", "--force", container.identity)
        container = None
    if container is None:
        identity = create(name, options.network)
    else:
        identity = container.identity
        if not container.running:
            docker("start", identity, failure=START_FAILED)
    say(f"container {identity[:12]} is running")
    command = config.load().after_creation
    chosen = settings.current()
    variables = ["--env", f"VLLM_VERSION={chosen.version}"] if chosen.version else []
    variables += ["--env", f"DEVICE={chosen.device}"] if chosen.device else []
    show("exec", *variables, identity, "bash", "-c", command, failure=f"{command} in the container")
    say("make shell opens it; make shell CMD='make bench' runs one command in it")
    return 0
