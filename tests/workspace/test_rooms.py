# SPDX-License-Identifier: Apache-2.0
"""Imports in workspace/ point one way: from a verb's room down to what all rooms stand on."""

from __future__ import annotations

import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests import imported
from workspace.host.paths import ROOT
from workspace.verbs import VERBS

# From the ground up; those of one floor do not know each other.
FLOORS = [
    {"host"},
    {"pins", "verbs"},
    {"environment"},
    {"fork", "credentials"},
    {"bench", "watch", "container", "bundle", "new_kernel", "kernels", "notebook", "clean"},
    {"doctor", "set_up", "reference"},
    {"cli"},
    {"bootstrap", "__main__"},
]
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


def test_what_runs_before_there_is_an_environment_needs_the_standard_library_only() -> None:
    todo = BEFORE_AN_ENVIRONMENT | {name for name in MODULES if name.startswith("container.")}
    done: set[str] = set()
    while todo - done:
        module = (todo - done).pop()
        done.add(module)
        ours, others = imports(MODULES[module], when_imported=True)
        assert others <= sys.stdlib_module_names, module
        todo |= ours
    assert {"host.git", "pins.release", "environment.uv"} <= done


@pytest.mark.parametrize("module", sorted(ALONE))
def test_what_runs_without_the_rest_of_the_workspace_imports_none_of_it(module: str) -> None:
    ours, others = imports(MODULES[module])
    assert not ours
    assert others <= sys.stdlib_module_names
