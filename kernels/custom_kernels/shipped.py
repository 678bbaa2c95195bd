# SPDX-License-Identifier: Apache-2.0
"""What a wheel of these kernels brings along: compiled libraries, and what they were built against.

``make wheel`` adds the folder ``_compiled``, which a checkout does not have: a library
``<operation>.<backend>.so`` per backend in CUDA C++, and ``built.json``::

    {"name": "my-kernels", "version": "1.2", "commit": "…",
     "built_against": {"vllm": "0.32.0", "torch": "2.13.0", "apache-tvm-ffi": "0.1.11"},
     "libraries": {"gemm.cublaslt": ["8.0", "9.0a", "10.0a", "12.0a"]}}
"""

import functools
import json
import logging
from importlib import metadata
from pathlib import Path
from typing import Any

from custom_kernels import paths

FOLDER = paths.PACKAGE / "_compiled"
GROUP = "vllm.general_plugins"

log = logging.getLogger(__name__)


@functools.cache
def built() -> dict[str, Any]:
    """What ``built.json`` says; empty where this package is not a wheel's."""
    path = FOLDER / "built.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def library(backend: str, architecture: str) -> Path | None:
    """The library of ``<operation>.<backend>`` that holds code for this architecture."""
    if architecture in built().get("libraries", {}).get(backend, ()):
        return FOLDER / f"{backend}.so"
    return None


def differences(host: dict[str, str]) -> list[str]:
    """Where ``host``, versions by package, is not what the wheel was built against; labels such as
    ``+cu130`` are no difference."""
    return [
        f"{name} {host[name]} instead of {version}"
        for name, version in built().get("built_against", {}).items()
        if name in host and host[name].split("+")[0] != version
    ]


def providers(value: str) -> list[str]:
    """The installed packages whose plugin for vLLM is ``value``, with their versions."""
    found = {
        f"{point.dist.name} {point.dist.version}"
        for point in metadata.entry_points(group=GROUP)
        if point.value == value and point.dist is not None
    }
    return sorted(found)


def warn(plugin: str, vllm: str) -> None:
    """Say in one line each what may make this process run other code than the user means."""
    installed = providers(plugin)
    if len(installed) > 1:
        log.warning(
            "these kernels are installed more than once: %s; this process runs those in %s, so "
            "uninstall the others",
            " and ".join(installed), paths.PACKAGE,
        )  # fmt: skip
    if built():
        host = {"vllm": vllm}
        for name in built()["built_against"].keys() - host:
            host[name] = metadata.version(name)
        if different := differences(host):
            log.warning(
                "%s %s was built against other versions: here is %s; make wheel-verify, in a "
                "checkout with VLLM_VERSION=, proves it on another release",
                built()["name"], built()["version"], " and ".join(different),
            )  # fmt: skip
