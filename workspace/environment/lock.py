# SPDX-License-Identifier: Apache-2.0
"""`make lock`: hash-pinned requirement files and conda's environment files from pins.toml.

The locks hold versions and hashes but no addresses, so they work with any mirror. One file is for
all supported Pythons (with environment markers).
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
from workspace.host.paths import ROOT, lock_files, lock_path
from workspace.pins.model import Pins, load
from workspace.pins.release import conda_file

GENERATED = "# Made by `make lock` from pins.toml; do not edit."


@dataclass(frozen=True)
class Entry:
    """A package of a lock."""

    name: str
    version: str
    sha256: frozenset[str]


def locked(files: Iterable[Path], markers: dict[str, str] | None = None) -> dict[str, Entry]:
    """Name → entry of the locks for a machine with these markers, by default this machine."""
    return parse("".join(path.read_text() for path in files), markers)


def parse(text: str, markers: dict[str, str] | None = None) -> dict[str, Entry]:
    """`locked`, for the text of a lock."""
    entries: dict[str, Entry] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        specification, *hashes = line.split(" --hash=sha256:")
        requirement = Requirement(specification.strip())
        if requirement.marker is None or requirement.marker.evaluate(markers):
            (pin,) = requirement.specifier
            name = canonicalize_name(requirement.name)
            entries[name] = Entry(name, pin.version, frozenset(map(str.strip, hashes)))
    return entries


def requirements(pins: Pins, version: str) -> list[str]:
    """The direct requirements of a release."""
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
    """A hash of everything in pins.toml on which the lock of a release depends."""
    inputs = [requirements(pins, version), pins.packages.gpu, sorted(pins.python.supported)]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def header(pins: Pins, version: str) -> str:
    return f"{GENERATED}\n# inputs sha256:{digest(pins, version)}\n"


def resolve(pins: Pins, lines: list[str], *, start: str | None) -> str:
    """Everything that the requirements need, for all supported Pythons, as the text of a lock.

    Versions in the lock of release `start` stay unless they conflict.
    """
    oldest = min(pins.python.supported, key=lambda v: tuple(map(int, v.split("."))))
    with tempfile.TemporaryDirectory() as work:
        source, output = Path(work) / "requirements.in", Path(work) / "lock.txt"
        source.write_text("\n".join(lines) + "\n")
        # uv keeps the versions of an existing output file.
        if start:
            locks = [path for path in lock_files(start, "cuda") if path.exists()]
            output.write_text("".join(path.read_text() for path in locks))
        command = [
            str(uv.obtain(sys.executable)), "pip", "compile", str(source), "-o", str(output), "-q",
            "--universal", "--python-version", oldest, "--generate-hashes",
            "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-package", "vllm",
        ]  # fmt: skip
        environment = {**os.environ, **index.uv_environment()}
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        if result.returncode:
            # uv wraps its explanation and draws a tree beside it.
            reason = re.sub(r"[\s│╰─▶×]+", " ", result.stderr).strip()
            raise WorkspaceError(f"the pins do not resolve: {index.redact(reason)}")
        return output.read_text()


def split(text: str, names: list[str]) -> tuple[str, str]:
    """Split a requirement file: the entries of all other packages, and those of `names`."""
    entries = re.findall(r"^\S.*\n?(?:    .*\n?)*", text, re.MULTILINE)
    named = [entry for entry in entries if entry.split("==", 1)[0] in names]
    return "".join(entry for entry in entries if entry not in named), "".join(named)


def environment_yml(version: str) -> str:
    """The same versions for conda: tool chain from conda-forge, Python packages from the lock."""
    specs = "".join(f"  - {spec}\n" for spec in conda.specs(version))
    return f"""\
{GENERATED} `make dev ENV=conda` makes the same
# and more; by hand: micromamba create -p <folder> -f {conda_file(version).name}
# No torch, NCCL or CUDA library of conda's: pip's torch brings its own, two do not mix.
# cmake and ninja come from the lock, too.
name: vllm-kernels
channels:
  - {conda.CHANNEL}
  - nodefaults
dependencies:
{specs}  - pip:
      - --requirement {lock_path(version).relative_to(ROOT)}
"""


def run(*, upgrade: bool = False, only: str | None = None) -> list[Path]:
    """Write the locks and the environment file of each release, or of one; returns the files."""
    pins = load()
    written: list[Path] = []
    for version in [only] if only else pins.vllm.release:
        start = version if lock_path(version).exists() else pins.vllm.default
        text = resolve(pins, requirements(pins, version), start=None if upgrade else start)
        everywhere, gpu = split(text, pins.packages.gpu)
        contents = {
            lock_path(version): header(pins, version) + everywhere,
            lock_path(version, gpu=True): header(pins, version) + gpu,
        }
        for path, content in contents.items():
            write_file(path, content.encode())
        written += [*contents, write_conda_file(version)]
    return written


def write_conda_file(version: str) -> Path:
    """Write the environment file of a release; returns the file."""
    path = conda_file(version)
    write_file(path, environment_yml(version).encode())
    return path
