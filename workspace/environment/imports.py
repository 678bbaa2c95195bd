# SPDX-License-Identifier: Apache-2.0
"""What an engine process would import: our tree and the locked packages, or files of the user that
shadow them.

Folders on PYTHONPATH precede all packages of the environment, and so do the user's site-packages
and the folder in which Python starts; a .pth file, a sitecustomize or another editable install can
do the same. That is allowed (a plugin of the user may be there) as long as it shadows nothing of
ours.

`python -m workspace` checks this before it imports anything that a user's file could shadow, so
this module imports little.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import re
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from workspace.host.errors import WorkspaceError
from workspace.host.paths import KERNELS, ROOT
from workspace.host.text import last_line

UNUSED = frozenset({"tests", "test", "benchmarks", "examples", "docs", "scripts", "tools"})
"""Folders that packages install at the top level by accident; nothing imports them."""
PYTHON_PATH, USER_SITE, START = OUTSIDE = (
    "PYTHONPATH",
    "your user site-packages",
    "the folder that Python starts in",
)
"""Origins outside of the environment; set-up changes none of them."""


@dataclass(frozen=True)
class Shadowed:
    """A module of ours in place of which another file would be imported.

    Args:
        module: its name.
        file: the other file (for a namespace package, a folder).
        origin: the variable or folder by which that file is found.
        remedy: what to do about it.
    """

    module: str
    file: str
    origin: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.module} would be imported from {self.file} ({self.origin})"


@dataclass(frozen=True)
class Imports:
    """What an engine process would import: normalized name of each distribution → version, and the
    modules of ours that would not be imported."""

    versions: dict[str, str]
    shadowed: list[Shadowed]


def probe(vllm: Path) -> Imports:
    """The imports of a process that is started like an engine by `bench.processes`.

    Args:
        vllm: the tree whose folder `vllm` is expected: the fork's, or the pristine release's.

    Raises:
        WorkspaceError: Python does not start.
    """
    command = [sys.executable, "-m", "workspace.environment.imports", str(vllm)]
    done = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise WorkspaceError(f"Python does not start as for an engine: {last_line(done.stderr)}")
    versions, shadowed = ast.literal_eval(done.stdout.splitlines()[-1])
    return Imports(versions, [Shadowed(*fields) for fields in shadowed])


def require_unshadowed(vllm: Path) -> None:
    """Raise if something outside of the environment shadows what this process would import.

    What an install in the environment shadows, set-up repairs, or the doctor names it.
    """
    outside = [module for module in shadowed(vllm) if module.origin in OUTSIDE]
    if outside:
        more = f" (and {len(outside) - 1} more)" if len(outside) > 1 else ""
        raise WorkspaceError(f"{outside[0]}{more}; {outside[0].remedy}, then re-run")


def drop_python_path() -> None:
    """Import nothing more from PYTHONPATH in this process; its children still do."""
    dropped = [folder.resolve() for folder in _python_path()]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in dropped]


def shadowed(vllm: Path) -> list[Shadowed]:
    """Modules of ours that this process would not import, vLLM and our kernels first."""
    ours = _package_folders()
    result = []
    for name, tree in (("vllm", vllm), ("custom_kernels", KERNELS)):
        paths = _locate(name)
        if paths and paths[0].parent.resolve() != tree.resolve():
            result.append(_shadowed(name, paths[0]))
    others = [folder for entry in sys.path if (folder := Path(entry).resolve()) not in ours]
    theirs = {folder: set(_importable(folder)) for folder in others if folder.is_dir()}
    names = {name for folder in ours for name in _importable(folder)}
    for name in sorted(names & set().union(*theirs.values()) - UNUSED - sys.stdlib_module_names):
        first: list[Path] = []
        for path in _locate(name):
            if path.parent.resolve() in ours:
                # A namespace package: modules that other parts of it have, too.
                result += [
                    _shadowed(f"{name}.{child}", other / child)
                    for other in first
                    for child in sorted(set(_importable(other)) & set(_importable(path)))
                ]
                break
            first.append(path)
        else:
            result += [_shadowed(name, path) for path in first[:1]]
    # The standard library: only against folders where users put files, for speed.
    users = {folder.resolve() for folder in (*_python_path(), _user_site(), Path.cwd())}
    for folder in users & theirs.keys():
        result += [
            _shadowed(name, path)
            for name in sorted(theirs[folder] & sys.stdlib_module_names)
            for path in _locate(name)[:1]
            if path.parent.resolve() == folder
        ]
    return result


def _package_folders() -> set[Path]:
    """The folders of the environment's packages that are on the path."""
    packages = [Path(sysconfig.get_path(which)).resolve() for which in ("purelib", "platlib")]
    on_path = {Path(entry).resolve() for entry in sys.path}
    return {path for path in on_path if any(path.is_relative_to(folder) for folder in packages)}


def _importable(folder: Path) -> Iterator[str]:
    """Names of the modules in a folder."""
    endings = {"py", "so", "abi3.so", sysconfig.get_config_var("EXT_SUFFIX")[1:]}
    for entry in os.scandir(folder):
        name, _, ending = entry.name.partition(".")
        loadable = ending in endings or (not ending and entry.is_dir())
        if loadable and name.isidentifier() and name != "__pycache__":
            yield name


def _locate(name: str) -> list[Path]:
    """The folder or file that `import name` would load, several for a namespace package."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(folder) for folder in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.has_location and spec.origin else []


def _shadowed(module: str, path: Path) -> Shadowed:
    origin, remedy = _origin(path, module)
    init = path / "__init__.py"
    return Shadowed(module, str(init if init.is_file() else path), origin, remedy)


def _origin(path: Path, module: str) -> tuple[str, str]:
    """By which variable or file Python finds `path`, and how to stop that."""
    folder = path.parents[module.count(".")].resolve()
    if folder in [entry.resolve() for entry in _python_path()]:
        return PYTHON_PATH, f"take {folder} out of PYTHONPATH"
    if folder == _user_site().resolve():
        return USER_SITE, "export PYTHONNOUSERSITE=1"
    if folder == Path.cwd().resolve():
        return START, f"move {path} away"
    for packages in site.getsitepackages():
        for pth in sorted(Path(packages).glob("*.pth")):
            lines = pth.read_text(errors="replace").splitlines()
            if folder in [(pth.parent / line).resolve() for line in lines if line.strip()]:
                return str(pth), f"remove {pth}"
    if folder in [Path(entry).resolve() for entry in sys.path]:
        for name in ("sitecustomize", "usercustomize"):
            if file := getattr(sys.modules.get(name), "__file__", None):
                return f"sys.path, perhaps because of {file}", f"remove {file}"
        return "sys.path", f"find what adds {folder} to sys.path"
    return (
        f"an import hook, such as another editable install in {Path(sys.prefix).name}",
        f"rm {sys.prefix}/workspace-*.json && make dev",
    )


def _python_path() -> list[Path]:
    return [Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _user_site() -> Path:
    return Path(site.getusersitepackages())


def _versions() -> dict[str, str]:
    from importlib import metadata  # here: slow to import, and `shadowed` does not need it

    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:
            versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return versions


def main() -> None:
    versions: dict[str, str] = {}
    with contextlib.suppress(Exception):  # if a module of the standard library is shadowed
        versions = _versions()
    print((versions, [astuple(module) for module in shadowed(Path(sys.argv[1]))]))


if __name__ == "__main__":
    main()
