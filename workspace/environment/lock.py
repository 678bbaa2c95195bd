# SPDX-License-Identifier: Apache-2.0
"""`make lock`: hash-pinned requirement files and conda's environment files from pins.toml.

The locks hold versions and hashes but no addresses, so they work with any mirror. One file
serves every supported Python (environment markers tell them apart).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from workspace.environment import conda, index, uv
from workspace.host.errors import WorkspaceError
from workspace.host.files import write_file
from workspace.host.paths import LOCKS, ROOT, lock_path
from workspace.pins.model import Pins, load
from workspace.pins.release import conda_file


@dataclass(frozen=True)
class Entry:
    """A package in the lock, as it applies to a machine."""

    name: str
    version: str
    sha256: frozenset[str]


def locked(files: Iterable[Path], markers: dict[str, str] | None = None) -> dict[str, Entry]:
    """Name → the lock's entry for a machine with these markers, else for this one."""
    found: dict[str, Entry] = {}
    for path in files:
        for entry in path.read_text().replace("\\\n", " ").splitlines():
            if not entry.strip() or entry.startswith("#"):
                continue
            text, *hashes = entry.split(" --hash=sha256:")
            requirement = Requirement(text.strip())
            if requirement.marker is None or requirement.marker.evaluate(markers):
                (pin,) = requirement.specifier
                name = canonicalize_name(requirement.name)
                sha256 = frozenset(value.strip() for value in hashes)
                found[name] = Entry(name, pin.version, sha256)
    return found


def requirements(pins: Pins, version: str) -> list[str]:
    """The direct requirements that a release's lock is resolved from."""
    release = pins.release(version)
    lines = [
        f"vllm=={version}",
        f"torch=={release.torch}",
        f"triton=={release.triton}",
        f"{release.cupy_package}=={release.cupy}",
    ]
    packages = {**pins.packages.direct, **release.packages}
    for group in (release.cuda.wheels, release.cuda.libraries, packages):
        lines += [f"{name}=={number}" for name, number in group.items()]
    return lines


def digest(pins: Pins, version: str) -> str:
    """A fingerprint of everything in pins.toml that a release's lock depends on."""
    inputs = [requirements(pins, version), pins.packages.gpu, sorted(pins.python.supported)]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def header(pins: Pins, version: str) -> str:
    return (
        "# Made by `make lock` from pins.toml; do not edit.\n"
        f"# inputs sha256:{digest(pins, version)}\n"
    )


def resolve(pins: Pins, lines: list[str], *, start: str | None) -> str:
    """All that the requirements need, resolved for all supported Pythons at once.

    Versions stay those of the lock of release `start`, where they fit.
    """
    binary = uv.obtain(sys.executable, pins.model_dump())
    oldest = min(pins.python.supported, key=lambda v: tuple(map(int, v.split("."))))
    with tempfile.TemporaryDirectory() as work:
        source, output = Path(work) / "requirements.in", Path(work) / "lock.txt"
        source.write_text("\n".join(lines) + "\n")
        # uv keeps what an existing output has, so that a lock moves only where it must.
        if start:
            paths = (lock_path(start), lock_path(start, gpu=True))
            output.write_text("".join(path.read_text() for path in paths if path.exists()))
        command = [
            str(binary), "pip", "compile", str(source), "-o", str(output), "-q",
            "--universal", "--python-version", oldest, "--generate-hashes",
            "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-package", "vllm",
        ]  # fmt: skip
        environment = {**os.environ, **index.uv_environment()}
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise WorkspaceError(f"the pins do not resolve: {index.hide(_because(result.stderr))}")
        return output.read_text()


def _because(complaint: str) -> str:
    """uv's explanation, which is several lines that it wraps, in one."""
    return re.sub(r"[\s│╰─▶×]+", " ", complaint).strip()


def split(text: str, names: list[str]) -> tuple[str, str]:
    """Part a requirement file: entries of the packages in `names`, and all the others."""
    entries = ("\n" + text).replace("\n    ", "\r    ").split("\n")
    entries = [entry.replace("\r", "\n") for entry in entries if entry.strip()]
    inside = [e for e in entries if e.split("==", 1)[0] in names]
    outside = [e for e in entries if e not in inside]
    return "\n".join(outside) + "\n", "\n".join(inside) + "\n"


def environment_yml(pins: Pins, version: str) -> str:
    """The conda way to the same versions: tool chain from conda-forge, Python from the lock."""
    lines = [
        "# Made by `make lock` from pins.toml; do not edit. `make dev ENV=conda` makes the same",
        f"# and more; by hand: micromamba create -p <folder> -f {conda_file(version).name}",
        "# No torch, NCCL or CUDA library of conda's: pip's torch brings its own, two do not mix.",
        "# cmake and ninja come from the lock, too.",
        "name: vllm-kernels",
        "channels:",
        f"  - {conda.CHANNEL}",
        "  - nodefaults",
        "dependencies:",
        *(f"  - {spec}" for spec in conda.specs(pins.model_dump(), version)),
        "  - pip:",
        f"      - --requirement {lock_path(version).relative_to(ROOT)}",
    ]
    return "\n".join(lines) + "\n"


def run(*, upgrade: bool = False, only: str | None = None) -> list[Path]:
    """Write the locks and the environment file of each release, or of one; returns the files."""
    pins = load()
    LOCKS.mkdir(exist_ok=True)
    written = []
    for version in [only] if only else pins.vllm.release:
        start = version if lock_path(version).exists() else pins.vllm.default
        text = resolve(pins, requirements(pins, version), start=None if upgrade else start)
        everywhere, gpu = split(text, pins.packages.gpu)
        for path, text in (
            (lock_path(version), everywhere),
            (lock_path(version, gpu=True), gpu),
        ):
            write_file(path, (header(pins, version) + text).encode())
            written.append(path)
        write_file(conda_file(version), environment_yml(pins, version).encode())
        written.append(conda_file(version))
    return written
