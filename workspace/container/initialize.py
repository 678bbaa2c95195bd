# SPDX-License-Identifier: Apache-2.0
"""What devcontainer.json runs on the host before VS Code or the devcontainer CLI opens it."""

from __future__ import annotations

from workspace import verbs
from workspace.container import image, start
from workspace.container.docker import has_nvidia_runtime
from workspace.environment.device import device
from workspace.host.text import say


def run(options: verbs.BuildImage) -> int:
    """Bring the image up to date; make the container where the CLI could not.

    With `hostRequirements.gpu` optional, the devcontainer CLI asks for GPUs wherever NVIDIA's
    runtime is installed, and without a GPU the container then does not start. There it is made
    here, without the request, and the CLI finds it by its labels.
    """
    name = image.ensure(options)
    runtime = has_nvidia_runtime()
    if runtime and device() == "cpu" and start.find() is None:
        say("NVIDIA's runtime is here, but no GPU: making the container without one")
        start.create(name, options.network)
    elif device() == "cuda" and not runtime:
        say("this machine has a GPU, but Docker cannot hand it on (no NVIDIA Container Toolkit)")
    return 0
