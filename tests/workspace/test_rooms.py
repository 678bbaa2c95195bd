# SPDX-License-Identifier: Apache-2.0
"""Imports in workspace/ point one way: from a verb's room down to what all rooms stand on."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from workspace.host import imported
from workspace.host.paths import ROOT
from workspace.verbs import VERBS

# From the ground up; those of one floor do not know each other.
FLOORS = [
    {"host"},
    {"pins", "verbs"},
    {"environment"},
    {"fork", "credentials", "convert"},
    {
        "bench", "watch", "container", "bundle", "new_kernel", "kernels", "editor", "notebook",
        "upgrade",
    },
    {
        "doctor", "set_up", "reference", "clean", "report", "eval", "trace", "capture", "ops",
        "wheel",
    },
    {"cli"},
    {"bootstrap", "__main__"},
]  # fmt: skip
# Run where no package is installed: by bootstrap.py before there is an environment, or on the host
# of a container. With all that they import.
BEFORE_AN_ENVIRONMENT = {
    "bootstrap", "environment.create", "environment.python",
    "fork.rebase_state", "fork.tree_state", *(verb.host for verb in VERBS.values() if verb.host),
}  # fmt: skip
# Copied to machines on which there is nothing else of the workspace.
ALONE = {"bundle.unbundle", "environment.inventory"}


def modules() -> dict[str, Path]:
    """Module, without `workspace.` → file. Templates become part of another package."""
    found = {}
    for path in sorted((ROOT / "workspace").rglob("*.py")):
        parts = path.relative_to(ROOT / "workspace").with_suffix("").parts
        if "templates" not in parts:
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path, *, when_imported: bool = False) -> tuple[set[str], set[str]]:
    """What a file imports: modules of workspace/, and the names of other packages. Anywhere in it,
    or only what is imported with it."""
    ours, others = set(), set()
    for name in imported.names(path, when_imported=when_imported):
        package, _, rest = name.partition(".")
        if package != "workspace":
            others.add(package)
        elif rest:
            ours.add(rest if rest in MODULES else rest.rpartition(".")[0])
    return ours - {""}, others


def floor(module: str) -> int:
    (number,) = [n for n, rooms in enumerate(FLOORS) if module.split(".", maxsplit=1)[0] in rooms]
    return number


def test_no_room_imports_from_a_floor_above_or_beside_it() -> None:
    for module, path in MODULES.items():
        for other in imports(path)[0] if module != "__init__" else ():
            same_room = other.split(".")[0] == module.split(".")[0]
            assert same_room or floor(other) < floor(module), f"{module} imports {other}"


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {module: imports(path)[0] - {module} for module, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names them


def imported_with(*names: str) -> tuple[set[str], set[str]]:
    """The modules of workspace/ and the other packages that are imported with these modules."""
    done: set[str] = set()
    packages: set[str] = set()
    todo = set(names)
    while todo - done:
        name = (todo - done).pop()
        done.add(name)
        ours, others = imports(MODULES[name], when_imported=True)
        todo |= ours
        packages |= others
    return done, packages


def test_what_runs_before_there_is_an_environment_needs_the_standard_library_only() -> None:
    container = {name for name in MODULES if name.startswith("container.")}
    modules, packages = imported_with(*BEFORE_AN_ENVIRONMENT, *container)
    assert packages <= sys.stdlib_module_names
    assert {"host.git", "pins.release", "environment.uv"} <= modules


def test_no_verb_imports_the_kernels_package_before_it_is_installed() -> None:
    """Any verb may be the first command on a machine."""
    assert "custom_kernels" not in imported_with("cli")[1]
    checked = 0
    body = ast.parse(MODULES["cli"].read_text()).body
    for verb in (node for node in body if isinstance(node, ast.FunctionDef)):
        for statement in verb.body:
            text = ast.unparse(statement)
            if "set_up." in text or "install_kernels()" in text:
                break  # from here on it is installed
            name = text.removeprefix("from workspace.").partition(" ")[0]
            if name in MODULES:
                checked += 1
                assert "custom_kernels" not in imported_with(name)[1], f"{verb.name}: {text}"
    assert checked > 5


@pytest.mark.parametrize("module", sorted(ALONE))
def test_what_runs_without_the_rest_of_the_workspace_imports_none_of_it(module: str) -> None:
    ours, others = imports(MODULES[module])
    assert not ours
    assert others <= sys.stdlib_module_names
