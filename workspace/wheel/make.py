# SPDX-License-Identifier: Apache-2.0
"""`make wheel`: the kernels, compiled, as a wheel for an environment with a released vLLM."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import setuptools_scm
from custom_kernels import paths, registry, shipped
from custom_kernels.compile import build

from workspace import kernels, verbs
from workspace.fork.tree_state import shown
from workspace.host.errors import WorkspaceError
from workspace.host.files import PARTIAL
from workspace.host.git import git
from workspace.host.paths import DIST, KERNELS, ROOT, STATE
from workspace.host.text import last_line, plural, say
from workspace.pins import release
from workspace.wheel import contents

BUILT_AGAINST = ("torch", "apache-tvm-ffi")
"""The packages on whose binary interfaces the libraries depend: required in these versions."""

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def run(options: verbs.Wheel) -> Path:
    """Write dist/<name>-<version>-py3-none-<platform>.whl; its path.

    Raises:
        WorkspaceError: an operation that does not exist, a kernel that does not compile, a name
            that is none.
    """
    name = options.name or metadata.metadata("custom-kernels")["Name"]
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
        raise WorkspaceError(
            f"NAME={name}: a package's name has letters, digits, '-', '_' and '.', such as "
            "my-kernels"
        )
    chosen = contents.operations(options.ops)
    architectures = kernels.architectures(options.arch)
    for operation in chosen if options.ops else (None,):  # all of them at a time
        kernels.compile_all(architectures, operation)
    STATE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=STATE, prefix=f"{PARTIAL}wheel-") as folder:
        stage = Path(folder) / "stage"
        libraries = lay_out(stage, name, chosen, architectures)
        wheel = _build(stage, Path(folder))
        DIST.mkdir(exist_ok=True)
        path = Path(shutil.move(wheel, DIST / wheel.name))
    say(
        f"{shown(path)}: {', '.join(chosen)}; {plural(len(libraries), 'compiled kernel')} "
        f"for {', '.join(architectures)}; {path.stat().st_size / 1e6:.1f} MB"
    )
    say("make wheel-verify serves a model with it, in an environment of its own")
    return path


def lay_out(
    stage: Path, name: str, chosen: list[str], architectures: list[str]
) -> dict[str, list[str]]:
    """Write the project that is built: library → its architectures."""
    package = stage / contents.PACKAGE
    for path in contents.files(chosen):
        target = package / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(paths.PACKAGE / path, target)
    compiled = package / shipped.FOLDER.name
    compiled.mkdir()
    libraries = {}
    for backend in registry.compiled():
        its = list(backend.architectures(architectures))
        if backend.operation.name in chosen and its:
            library = build.library_path(backend, its)
            if not library.is_file():
                raise WorkspaceError(f"{backend} is not compiled (see above), so no wheel was made")
            shutil.copyfile(library, compiled / f"{backend}.so")
            libraries[str(backend)] = its
    project = tomllib.loads((KERNELS / "pyproject.toml").read_text())["project"]
    # From git: the tag, or how many commits after which, and with today's date if files are edited.
    version = setuptools_scm.get_version(str(ROOT), fallback_version=project["version"])
    against = {one: metadata.version(one).split("+")[0] for one in BUILT_AGAINST}
    (compiled / "built.json").write_text(
        json.dumps(
            {
                "name": name,
                "version": version,
                "commit": git("rev-parse", "HEAD", tree=ROOT).strip(),
                "built_against": {"vllm": release.selected(), **against},
                "libraries": libraries,
            },
            indent=1,
        )
    )
    for file in (KERNELS / project["readme"], ROOT / "LICENSE"):
        shutil.copyfile(file, stage / file.name)
    requirements = [f"{one}=={number}" for one, number in against.items()]
    (stage / "pyproject.toml").write_text(_pyproject(project, name, version, requirements))
    # Its Python runs everywhere, its libraries on this kind of machine.
    platform = re.sub(r"\W", "_", sysconfig.get_platform()) if libraries else "any"
    (stage / "setup.cfg").write_text(f"[bdist_wheel]\nplat_name = {platform}\n")
    return libraries


def _pyproject(
    project: Mapping[str, Any], name: str, version: str, requirements: Iterable[str]
) -> str:
    points = project["entry-points"][shipped.GROUP]
    text = json.dumps  # a JSON string or list of strings is TOML as well
    return f"""\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = {text(name)}
version = {text(version)}
description = {text(project["description"])}
readme = {text(project["readme"])}
license = {text(project["license"])}
requires-python = {text(project["requires-python"])}
dependencies = {text(list(requirements))}

[project.entry-points.{text(shipped.GROUP)}]
{chr(10).join(f"{text(key)} = {text(value)}" for key, value in points.items())}

[tool.setuptools.packages.find]
include = ["{contents.PACKAGE}*"]

[tool.setuptools.package-data]
"*" = ["*"]
"""


def _build(stage: Path, folder: Path) -> Path:
    """The wheel of a project, by setuptools."""
    ran = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=stage, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ran.returncode:
        raise WorkspaceError(f"setuptools could not make the wheel: {last_line(ran.stderr)}")
    (wheel,) = folder.glob("*.whl")
    return wheel
