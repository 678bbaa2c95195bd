# SPDX-License-Identifier: Apache-2.0
"""What devcontainer.json runs on the host before VS Code or the devcontainer CLI opens it."""

from __future__ import annotations

from workspace import verbs
from workspace.container import image, start
from workspace.container.docker import has_nvidia_runtime
from workspace.host.settings import device
from workspace.host.text import say


def run(options: verbs.BuildImage) -> int:
    """Bring the image up to date; create the container where the devcontainer CLI cannot.

    With `hostRequirements.gpu` optional, the CLI requests GPUs wherever NVIDIA's runtime is
    installed, and without a GPU the container then does not start. In that case it is created here,
    without the request, and the CLI finds it by its labels.
    """
    name = image.ensure(options)
    runtime = has_nvidia_runtime()
    if runtime and device() == "cpu" and start.find() is None:
        say(
            "NVIDIA's runtime is installed, but there is no GPU: creating the container without one"
        )
        start.create(name, options.network)
    elif device() == "cuda" and not runtime:
        say("this machine has a GPU, but containers cannot use it (no NVIDIA Container Toolkit)")
    return 0
