# SPDX-License-Identifier: Apache-2.0
"""`make image`: the image of the development container, with everything in it but the checkout.

It is rebuilt when the Dockerfile, its arguments or the files in its context change. Otherwise no
registry is asked, so a container opens without a network.
"""

from __future__ import annotations

import contextlib
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
from workspace.container.docker import architecture, docker, inspect_image, show
from workspace.environment import conda, index, uv
from workspace.host import settings
from workspace.host.errors import WorkspaceError
from workspace.host.files import write_file
from workspace.host.git import git
from workspace.host.paths import ROOT, STATE, lock_files
from workspace.host.settings import device
from workspace.host.text import say
from workspace.pins import release

DOCKERFILE = ROOT / ".devcontainer" / "Dockerfile"
CONTEXT = STATE / "container"
INDEX = CONTEXT / "index.env"
ENVIRONMENTS = ("conda", "uv")
PREFIX = "vllm-kernels"
"""The prefix of the workspace's labels."""


def environment() -> str:
    """ENV=, in an image conda by default."""
    name = settings.current().env or "conda"
    if name not in ENVIRONMENTS:
        raise WorkspaceError(f"ENV={name}: an image has ENV=conda or ENV=uv")
    return name


def base_image(name: str | None, pins: Mapping[str, Any], version: str) -> str:
    """BASE_IMAGE= if given (vllm: vLLM's own image of the release), else the pinned one."""
    name = name or pins["container"]["base"]
    return f"vllm/vllm-openai:v{version}" if name == "vllm" else str(name)


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
        "UV_SHA256": uv.pinned_sha256(architecture()),
        "USER_UID": str(uid),
        "USER_GID": str(gid),
    }


def lay_out_context(version: str) -> list[Path]:
    """Write the build's context and the container's pip.conf; returns the context's files.

    Addresses of an index can hold passwords, so they reach the build as a secret, and the
    container through a file in the checkout: neither is part of any image.
    """
    certificate = index.certificate()
    contents = {
        "lock.txt": b"".join(path.read_bytes() for path in lock_files(version, device())),
        "conda.txt": "".join(f"{one}\n" for one in conda.specs(version)).encode(),
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
        os.chown(path, *config.owner())  # made by sudo, the container could not read them
    return [CONTEXT / name for name in contents]


def fingerprint(files: list[Path], build: Mapping[str, str]) -> str:
    """Hash of everything that the image is made from."""
    digest = hashlib.sha256(json.dumps(build, sort_keys=True).encode())
    for path in [DOCKERFILE, *files]:
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def labels(version: str, mark: str, lock: bytes, build: Mapping[str, str]) -> dict[str, str]:
    """The image's labels: the workspace's commit, the lock, the pins."""
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
    """The first line of each step of the build's log, which says what it does; else nothing."""
    match = re.match(r"#\d+ (\[\S+ \d+/\d+\] .*|exporting layers.*)", line)
    text = re.sub(r"--mount=\S+\s*|\s{2,}", "", match[1]) if match else ""
    return f"  {text[:100]}\n" if text else ""


def ensure(options: verbs.BuildImage, *, force: bool = False) -> str:
    """The name of the container's image, built if its inputs have changed; `force`: every step.

    Raises:
        WorkspaceError: no engine, no base image, no disk space; nothing is tagged then.
    """
    version = release.selected()
    release.require_pinned(version)
    name = config.load().image
    files = lay_out_context(version)
    build = arguments(version, options.base_image)
    mark = fingerprint(files, build)
    existing = inspect_image(name)
    if existing and existing.labels.get(f"{PREFIX}.fingerprint") == mark and not force:
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
    command += ["--no-cache"] if force else []
    show(
        *command, str(CONTEXT),
        env={"DOCKER_BUILDKIT": "1", "BUILDKIT_PROGRESS": "plain"},
        failure=f"the image on {build['BASE_IMAGE']} could not be built",
        brief=_step,
    )  # fmt: skip
    built = inspect_image(name)
    if existing and built and existing.identity != built.identity:
        # It has no name any more. Refused, and kept, if it has a container.
        with contextlib.suppress(WorkspaceError):
            docker("rmi", existing.identity)
    return name


def run(options: verbs.Image) -> int:
    """Build the image if need be, and show its size."""
    name = ensure(options, force=options.force)
    size = int(docker("image", "inspect", "--format", "{{.Size}}", name)) / 1e9
    say(f"{name} is up to date, {size:.1f} GB")
    return 0
