# SPDX-License-Identifier: Apache-2.0
"""`make image`: the image of the development container, with everything in it but the checkout.

What it is made from decides whether it has to be made again: the Dockerfile, its arguments and
the files in its context. Where the image has that fingerprint already nothing is asked of any
registry, so a container opens without a network.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workspace import verbs
from workspace.container import config
from workspace.container.docker import architecture, docker, inspect, show
from workspace.container.docker import labels as labels_of
from workspace.environment import conda, index, uv
from workspace.environment.device import device
from workspace.host import settings
from workspace.host.errors import WorkspaceError
from workspace.host.files import write_file
from workspace.host.git import git
from workspace.host.paths import ROOT, STATE, lock_files
from workspace.host.text import say
from workspace.pins import release

DOCKERFILE = ROOT / ".devcontainer" / "Dockerfile"
CONTEXT = STATE / "container"
INDEX = CONTEXT / "index.env"
ENVIRONMENTS = ("conda", "uv")
PREFIX = "vllm-kernels"
"""How the names of our labels begin."""


def environment() -> str:
    """ENV=, which in the image is conda unless uv is asked for."""
    asked = settings.current().env or "conda"
    if asked not in ENVIRONMENTS:
        raise WorkspaceError(f"ENV={asked}: an image has ENV=conda or ENV=uv")
    return asked


def base_image(asked: str | None, pins: Mapping[str, Any], version: str) -> str:
    """BASE_IMAGE= if given (vllm: vLLM's own image of the release), else the pinned one."""
    asked = asked or pins["container"]["base"]
    return f"vllm/vllm-openai:v{version}" if asked == "vllm" else str(asked)


def arguments(version: str, base: str | None = None) -> dict[str, str]:
    """The Dockerfile's arguments; `base` as BASE_IMAGE=.

    Raises:
        WorkspaceError: no engine, or one of a machine for which uv is not pinned.
    """
    pins = release.pins()
    uid, gid = config.owner()
    return {
        "BASE_IMAGE": base_image(base, pins, version),
        "MICROMAMBA_IMAGE": pins["container"]["micromamba"],
        "ENVIRONMENT": environment(),
        "PREFIX": release.environment(environment(), version).name,
        "UV_VERSION": pins["uv"]["version"],
        "UV_SHA256": uv.pinned_sha256(pins, architecture()),
        "USER_UID": str(uid),
        "USER_GID": str(gid),
    }


def lay_out_context(version: str) -> list[Path]:
    """Write the build's context, and what the container's pip asks; returns the context's files.

    Addresses of an index can hold passwords, so they reach the build as a secret, and the
    container through a file in the checkout: neither is part of any image.
    """
    certificate = index.certificate()
    contents = {
        "lock.txt": b"".join(path.read_bytes() for path in lock_files(version, device())),
        "conda.txt": "".join(f"{one}\n" for one in conda.specs(release.pins(), version)).encode(),
        "ca.crt": Path(certificate).read_bytes() if certificate else b"",
    }
    for name, content in contents.items():
        write_file(CONTEXT / name, content)
    settings = index.container_settings()
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in settings.items()]
    write_file(INDEX, "".join(lines).encode(), mode=0o600)
    pip = {"PIP_INDEX_URL": "index-url", "PIP_EXTRA_INDEX_URL": "extra-index-url"}
    lines = [f"{key} = {settings[name]}\n" for name, key in pip.items() if name in settings]
    write_file(CONTEXT / "pip.conf", "".join(["[global]\n", *lines]).encode(), mode=0o600)
    for path in (STATE, CONTEXT, *CONTEXT.iterdir()):
        os.chown(path, *config.owner())  # made by sudo, they would be out of the container's reach
    return [CONTEXT / name for name in contents]


def fingerprint(files: list[Path], build: Mapping[str, str]) -> str:
    """Of everything that the image is made from."""
    digest = hashlib.sha256(json.dumps(build, sort_keys=True).encode())
    for path in [DOCKERFILE, *files]:
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def labels(version: str, mark: str, lock: bytes, build: Mapping[str, str]) -> dict[str, str]:
    """What an image says of itself: our commit, the lock, the pins."""
    pins = release.pins()["vllm"]["release"][version]
    versions = {
        "vllm": version, "torch": pins["torch"], "triton": pins["triton"], "cupy": pins["cupy"],
        "cuda": pins["cuda"]["toolkit"], "uv": build["UV_VERSION"],
    }  # fmt: skip
    commit = git("rev-parse", "HEAD", tree=ROOT, check=False).strip()
    return {
        "org.opencontainers.image.revision": commit or "unknown",
        f"{PREFIX}.fingerprint": mark,
        f"{PREFIX}.lock": hashlib.sha256(lock).hexdigest(),
        f"{PREFIX}.pins": json.dumps(versions, separators=(",", ":")),
        f"{PREFIX}.environment": build["ENVIRONMENT"],
        f"{PREFIX}.base": build["BASE_IMAGE"],
        f"{PREFIX}.user": f"{build['USER_UID']}:{build['USER_GID']}",
    }


def _step(line: str) -> str:
    """Of the build's log only how each step begins, which says what it does."""
    found = re.match(r"#\d+ (\[\S+ \d+/\d+\] .*|exporting layers.*)", line)
    text = re.sub(r"--mount=\S+\s*|\s{2,}", "", found[1]) if found else ""
    return f"  {text[:100]}\n" if text else ""


def ensure(options: verbs.BuildImage, *, anew: bool = False) -> str:
    """The name of the container's image, built where what it is made from has changed; `anew`:
    every step of it.

    Raises:
        WorkspaceError: no engine, no base image in reach, no space; nothing is tagged then.
    """
    version = release.selected()
    release.require_pinned(version)
    name = config.load().image
    files = lay_out_context(version)
    build = arguments(version, options.base_image)
    mark = fingerprint(files, build)
    there = labels_of(inspect("image", name))
    if there.get(f"{PREFIX}.fingerprint") == mark and not anew:
        return name
    say(f"building {name} on {build['BASE_IMAGE']} with {build['ENVIRONMENT']}")
    command = ["build", "--file", str(DOCKERFILE), "--tag", name]
    command += ["--network", options.network or "default"]
    command += ["--secret", f"id=index,src={INDEX}"]
    for key, value in build.items():
        command += ["--build-arg", f"{key}={value}"]
    lock = (CONTEXT / "lock.txt").read_bytes()
    for key, value in labels(version, mark, lock, build).items():
        command += ["--label", f"{key}={value}"]
    command += ["--no-cache"] if anew else []
    show(
        *command, str(CONTEXT),
        env={"DOCKER_BUILDKIT": "1", "BUILDKIT_PROGRESS": "plain"},
        failure=f"the image on {build['BASE_IMAGE']} could not be built",
        brief=_step,
    )  # fmt: skip
    return name


def run(options: verbs.Image) -> int:
    """Build the image, or say that it is there."""
    name = ensure(options, anew=options.force)
    size = int(docker("image", "inspect", "--format", "{{.Size}}", name)) / 1e9
    say(f"{name} is up to date, {size:.1f} GB")
    return 0
