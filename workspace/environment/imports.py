# SPDX-License-Identifier: Apache-2.0
"""What a process of the engine's kind would import: our tree and the locked packages, or a file
that something of the user's puts in front of them.

Folders on PYTHONPATH go before all packages of the environment, and so do the user's own
site-packages and the folder in which Python starts; a .pth file, a sitecustomize or another
editable install can do the same. All of it is left as it is (a plugin of the user's may come that
way) as long as it hides nothing of ours.

Standard library only, and little of it: `python -m workspace` asks here before it imports anything
that a user's file could hide.
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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from workspace.host.errors import WorkspaceError
from workspace.host.paths import KERNELS, ROOT

UNUSED = frozenset({"tests", "test", "benchmarks", "examples", "docs", "scripts", "tools"})
"""Packages carry such folders to the top by accident, and nothing imports them by these names."""
PYTHON_PATH, USER_SITE, START = OUTSIDE = (
    "PYTHONPATH",
    "your user site-packages",
    "the folder that Python starts in",
)
"""What may bring another file from outside of the environment; set-up changes none of them."""


@dataclass(frozen=True)
class Hidden:
    """A module of ours that something else is imported in place of.

    `file` is what would be imported (a folder, for a namespace package), `brought_by` the variable
    or place that puts it there, `remedy` what to do about it.
    """

    module: str
    file: str
    brought_by: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.module} would be imported from {self.file} ({self.brought_by})"


@dataclass(frozen=True)
class Imports:
    """What a process of the engine's kind would import.

    `files`: `vllm` and `custom_kernels` → their file, left out where there is none. `versions`: the
    normalized name of every distribution → its version there.
    """

    files: dict[str, str]
    versions: dict[str, str]
    hidden: list[Hidden]


def look(vllm: Path, environment: Mapping[str, str] | None = None) -> Imports:
    """Ask a process that is started as `bench.processes` starts the engine's.

    Args:
        vllm: the tree whose folder `vllm` is to be imported: the fork's, or the pristine release's.
        environment: that process's environment; without it, this process's own.

    Raises:
        WorkspaceError: no Python starts in that environment.
    """
    command = [sys.executable, "-m", "workspace.environment.imports", str(vllm)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise WorkspaceError(f"Python does not start as the engine's would: {reason}")
    told = ast.literal_eval(done.stdout.splitlines()[-1])
    return Imports(
        files=told["files"],
        versions=told["versions"],
        hidden=[Hidden(**one) for one in told["hidden"]],
    )


def require_own(vllm: Path) -> None:
    """Raise where something from outside of the environment hides what this process would import.

    What an install in the environment hides, set-up puts right, or the doctor names.
    """
    found = [one for one in hidden(vllm) if one.brought_by in OUTSIDE]
    if found:
        more = f" (and {len(found) - 1} more such)" if len(found) > 1 else ""
        raise WorkspaceError(f"{found[0]}{more}; {found[0].remedy}, then re-run")


def set_python_path_aside() -> None:
    """Import nothing more from PYTHONPATH in this process; those it starts still would."""
    given = [one.resolve() for one in _python_path()]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in given]


def hidden(vllm: Path) -> list[Hidden]:
    """What this process would import in place of what is ours, vLLM and our kernels first."""
    own = _own_folders()
    found = []
    for name, tree in (("vllm", vllm), ("custom_kernels", KERNELS)):
        places = _places(name)
        if places and places[0].parent.resolve() != tree.resolve():
            found.append(_hidden(name, places[0]))
    others = [folder for entry in sys.path if (folder := Path(entry).resolve()) not in own]
    theirs = {folder: set(_importable(folder)) for folder in others if folder.is_dir()}
    names = {name for folder in own for name in _importable(folder)}
    for name in sorted(names & set().union(*theirs.values()) - UNUSED - sys.stdlib_module_names):
        before: list[Path] = []
        for place in _places(name):
            if place.parent.resolve() in own:
                found += [_hidden(*one) for one in _in_front(name, before, place)]
                break
            before.append(place)
        else:
            found += [_hidden(name, place) for place in before[:1]]
    # Python's own modules: only against folders where users put files, its own are many.
    users = {folder.resolve() for folder in (*_python_path(), _user_site(), Path.cwd())}
    for folder in users & theirs.keys():
        found += [
            _hidden(name, place)
            for name in sorted(theirs[folder] & sys.stdlib_module_names)
            for place in _places(name)[:1]
            if place.parent.resolve() == folder
        ]
    return found


def _own_folders() -> set[Path]:
    """The environment's own folders of packages."""
    packages = [Path(sysconfig.get_path(which)).resolve() for which in ("purelib", "platlib")]
    on_path = {Path(entry).resolve() for entry in sys.path}
    return {one for one in on_path if any(one.is_relative_to(folder) for folder in packages)}


def _importable(folder: Path) -> Iterator[str]:
    """Names that can be imported from a folder, read off its files."""
    endings = {"py", "so", "abi3.so", sysconfig.get_config_var("EXT_SUFFIX")[1:]}
    for entry in os.scandir(folder):
        name, _, ending = entry.name.partition(".")
        loadable = ending in endings or (not ending and entry.is_dir())
        if loadable and name.isidentifier() and name != "__pycache__":
            yield name


def _places(name: str) -> list[Path]:
    """The folder or file that `import name` would take, several for a namespace package."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(place) for place in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.has_location and spec.origin else []


def _in_front(name: str, others: list[Path], ours: Path) -> Iterator[tuple[str, Path]]:
    """Modules of our part of a namespace package that other parts of it have, too."""
    for other in others:
        for child in sorted(set(_importable(other)) & set(_importable(ours))):
            yield f"{name}.{child}", other / child


def _hidden(module: str, place: Path) -> Hidden:
    """`place` with what brings it."""
    brought_by, remedy = _brought_by(place, module)
    init = place / "__init__.py"
    return Hidden(module, str(init if init.is_file() else place), brought_by, remedy)


def _brought_by(place: Path, module: str) -> tuple[str, str]:
    folder = place.parents[module.count(".")].resolve()
    if folder in [one.resolve() for one in _python_path()]:
        return PYTHON_PATH, f"take {folder} out of PYTHONPATH"
    if folder == _user_site().resolve():
        return USER_SITE, "export PYTHONNOUSERSITE=1"
    if folder == Path.cwd().resolve():
        return START, f"move {place} away"
    for packages in site.getsitepackages():
        for path in sorted(Path(packages).glob("*.pth")):
            lines = path.read_text(errors="replace").splitlines()
            if folder in [(path.parent / line).resolve() for line in lines if line.strip()]:
                return str(path), f"remove {path}"
    if folder in [Path(entry).resolve() for entry in sys.path]:
        for name in ("sitecustomize", "usercustomize"):
            if file := getattr(sys.modules.get(name), "__file__", None):
                return f"sys.path, perhaps by {file}", f"remove {file}"
        return "sys.path", f"find what puts {folder} on sys.path"
    return (
        f"an import hook, such as another editable install in {Path(sys.prefix).name}",
        f"rm {sys.prefix}/workspace-*.json && make dev",
    )


def _python_path() -> list[Path]:
    given = os.environ.get("PYTHONPATH", "")
    return [Path(entry) for entry in given.split(os.pathsep) if entry]


def _user_site() -> Path:
    return Path(site.getusersitepackages())


def _versions() -> dict[str, str]:
    from importlib import metadata  # late: slow to import, and `hidden` does not need it

    found: dict[str, str] = {}
    for one in metadata.distributions():
        if name := one.metadata["Name"]:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), one.version)
    return found


def main() -> None:
    files = {}
    for name in ("vllm", "custom_kernels"):
        if places := _places(name):
            files[name] = str(places[0] / "__init__.py")
    versions = {}
    with contextlib.suppress(Exception):  # where a module of Python's own is hidden
        versions = _versions()
    found = [asdict(one) for one in hidden(Path(sys.argv[1]))]
    print({"files": files, "versions": versions, "hidden": found})


if __name__ == "__main__":
    main()
