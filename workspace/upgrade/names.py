# SPDX-License-Identifier: Apache-2.0
"""The names of vLLM that our Python files use, looked up in a tree's sources without importing it.

A name is what `from vllm.a import b` imports, or an attribute of a module so imported (`envs.x`).
It is there if the file of its module assigns, defines or imports it at the top level, or computes
its names (a module-level `__getattr__`) and mentions it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from workspace.host.paths import KERNELS, ROOT

USERS = (KERNELS / "custom_kernels", ROOT / "workspace" / "bench", ROOT / "workspace" / "eval")
"""Folders whose files run inside vLLM or read it."""
SETTLED = "releases.py"
"""Files of this name ask a tree what it has."""


@dataclass(frozen=True, order=True)
class Name:
    """A name of vLLM, and the first file of ours that uses it."""

    module: str
    attribute: str
    user: str

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


@dataclass(frozen=True)
class Missing:
    """A name that a tree does not have where we expect it, and the modules that define it."""

    name: Name
    elsewhere: tuple[str, ...]

    def __str__(self) -> str:
        where = f"now in {', '.join(self.elsewhere)}" if self.elsewhere else "defined nowhere"
        return f"{self.name} (used in {self.name.user}): {where}"


def used(tree: Path, folders: Iterable[Path] = USERS) -> list[Name]:
    """Every name of vLLM that the files below `folders` use; `tree` tells modules from names."""
    found: dict[tuple[str, str], Name] = {}
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        if path.name == SETTLED:
            continue
        user = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        for module, attribute in _of_file(ast.parse(path.read_text()), tree):
            found.setdefault((module, attribute), Name(module, attribute, user))
    return sorted(found.values())


def missing(tree: Path, names: Iterable[Name]) -> list[Missing]:
    """The names that the tree does not have."""
    absent = [name for name in names if not _has(tree, name.module, name.attribute)]
    return [Missing(name, tuple(_definitions(tree, name.attribute))) for name in absent]


def _of_file(file: ast.Module, tree: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of each import from vLLM, and of each attribute of a module so imported."""
    modules: dict[str, str] = {}
    for node in ast.walk(file):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
            assert node.module
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if _file(tree, whole) and not _assigned(tree, node.module, alias.name):
                    modules[alias.asname or alias.name] = whole
                else:
                    yield node.module, alias.name
    settled = {id(node) for statement in _asking(file) for node in ast.walk(statement)}
    for node in ast.walk(file):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module and id(node) not in settled and not _file(tree, f"{module}.{node.attr}"):
                yield module, node.attr


def _asking(file: ast.Module) -> Iterator[ast.Assign]:
    """Assignments that ask what there is, for a name that releases have differently."""
    for node in ast.walk(file):
        if isinstance(node, ast.Assign):
            called = {one.func.id for one in ast.walk(node.value)
                      if isinstance(one, ast.Call) and isinstance(one.func, ast.Name)}  # fmt: skip
            if called & {"getattr", "hasattr"}:
                yield node


def _file(tree: Path, module: str) -> Path | None:
    """The file of a module or package."""
    base = tree / module.replace(".", "/")
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _has(tree: Path, module: str, attribute: str) -> bool:
    path = _file(tree, module)
    if path is None:
        return False
    if _assigned(tree, module, attribute):
        return True
    text = path.read_text()
    return "__getattr__" in _top_level(path) and re.search(rf"\b{attribute}\b", text) is not None


def _assigned(tree: Path, module: str, attribute: str) -> bool:
    path = _file(tree, module)
    return path is not None and attribute in _top_level(path)


@cache
def _top_level(path: Path) -> frozenset[str]:
    """The names that a file assigns, defines or imports at its top level."""
    return frozenset(_bound(ast.parse(path.read_text()).body))


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=targets):
                for target in targets:
                    yield from (one.id for one in ast.walk(target) if isinstance(one, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from (alias.asname or alias.name.partition(".")[0] for alias in names)
            case ast.If(body=inner, orelse=other) | ast.Try(body=inner, orelse=other):
                yield from _bound(inner)
                yield from _bound(other)
                for handler in node.handlers if isinstance(node, ast.Try) else ():
                    yield from _bound(handler.body)
            case _:
                pass


def _definitions(tree: Path, attribute: str) -> list[str]:
    """The modules of the tree that define the name, by the text of their files; the first three."""
    pattern = re.compile(rf"^(?:class|def|async def) {attribute}\b|^{attribute}\b.*=", re.MULTILINE)
    files = (path for path in sorted((tree / "vllm").rglob("*.py")) if "tests" not in path.parts)
    found = (path for path in files if pattern.search(path.read_text()))
    modules = [".".join(path.relative_to(tree).with_suffix("").parts) for path in found]
    return [module.removesuffix(".__init__") for module in modules][:3]
