# SPDX-License-Identifier: Apache-2.0
"""docs/troubleshooting.md has an entry for every error of ours, and no entry without an error.

An entry is a row of a table whose first cell quotes words of messages as code, `…` standing for
what varies. The messages are read from the sources: what error types, and the calls of `CARRIERS`,
are given. A message without words of its own (`f"{name}: {reason}"`) is followed to where its parts
are made.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from workspace.host.paths import KERNELS, ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
ERROR = re.compile(r"(Error|NoCompiler)\b")
CARRIERS = {
    "errors.append",
    "failures.append",
    "log.warning",
    "_warn_once",
    "problem",  # a row of make doctor
    "sys.exit",
}
"""Calls besides those of error types whose first argument is shown to the user."""
LISTS = {"checks.py", "evaluate.py"}
"""Files whose functions return failures as lists of lines."""
FEWEST = 6
"""A message with fewer letters has no words of its own."""
NOT_ERRORS = {
    "……; …, then re-run",  # after what `Shadowed` says
    "… is quantized (…) and computes something else",  # a note in a record
    "… loads the same weights as dense ones…",  # another
    "and … more",
    "and … others",
    "damaged",  # always caught
    "failed: …",  # before each failure of a bench
    "of this environment",
    "releases",
    "· removing …",
}
"""Strings that only look like messages."""


@dataclass(frozen=True)
class Module:
    tree: ast.Module
    functions: dict[str, ast.FunctionDef]
    imported: dict[str, tuple[str, str]]
    """Local name → module and name there."""


@cache
def module(path: Path) -> Module:
    tree = ast.parse(path.read_text())
    found = Module(tree, {}, {})
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found.functions[node.name] = node
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found.imported[alias.asname or alias.name] = node.module, alias.name
    return found


def words(node: ast.expr) -> str:
    """The text of an expression, with `…` for what varies."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%[sdr]", "…", text)
        case ast.JoinedStr(values=parts):
            return "".join(map(words, parts))
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return words(left) + words(right)
        case _:
            return "…"


def messages(node: ast.expr, where: Module, scope: ast.AST) -> Iterator[str]:
    """The messages that an expression in `scope` may be."""
    text = " ".join(words(node).split())
    if len(re.findall(r"[A-Za-z]", text)) >= FEWEST:
        yield text
        return
    parts: list[ast.expr] = []
    match node:
        case ast.JoinedStr(values=values) | ast.BoolOp(values=values) | ast.List(elts=values):
            parts = values
        case ast.FormattedValue(value=value) | ast.ListComp(elt=value):
            parts = [value]
        case ast.BinOp(left=one, right=other) | ast.IfExp(body=one, orelse=other):
            parts = [one, other]
        case ast.Name(id=name):
            parts = list(assigned(name, where, scope))
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=arguments):
            parts = arguments
            there, known = where, where.functions.get(name)
            if name in where.imported:
                origin, original = where.imported[name]
                for base in (ROOT, KERNELS):
                    if (path := (base / origin.replace(".", "/")).with_suffix(".py")).is_file():
                        there = module(path)
                        known = there.functions.get(original)
            for made in ast.walk(known) if known else ():
                if isinstance(made, ast.Return) and made.value and known and known is not scope:
                    yield from messages(made.value, there, known)
    for part in parts:
        yield from messages(part, where, scope)


def assigned(name: str, where: Module, scope: ast.AST) -> Iterator[ast.expr]:
    """The strings that a function gives a variable; also from the columns of a table that it goes
    through."""
    for node in ast.walk(scope):
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=target)], value=value)
                | ast.AugAssign(target=ast.Name(id=target), value=value)
                | ast.NamedExpr(target=ast.Name(id=target), value=value)
            ) if target == name and not isinstance(value, ast.List):
                yield value
            case ast.For(target=ast.Tuple(elts=targets), iter=table):
                for column, one in enumerate(targets):
                    if isinstance(one, ast.Name) and one.id == name:
                        for row in rows(table, where):
                            if isinstance(row, ast.Tuple):
                                yield row.elts[column]
    if name.isupper() and scope is not where.tree:
        yield from assigned(name, where, where.tree)


def rows(table: ast.expr, where: Module) -> list[ast.expr]:
    """The rows of a table that is written out, in its place or as a constant of the module."""
    if isinstance(table, ast.Name):
        for node in where.tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == table.id:
                table = node.value
    return table.elts if isinstance(table, ast.List | ast.Tuple) else []


def shown(node: ast.AST, file: str) -> Iterator[ast.expr]:
    """What a statement or call shows to the user."""
    match node:
        case ast.Call(func=function, args=arguments, keywords=keywords):
            name = ast.unparse(function)
            to_user = name == "print" and any(one.arg == "file" for one in keywords)
            if arguments and (ERROR.search(name) or name in CARRIERS or to_user):
                yield arguments[0]
            yield from (one.value for one in keywords if one.arg == "failure")
        case ast.AugAssign(target=ast.Name(id="failures"), value=value):
            yield value
        case ast.FunctionDef(name="__str__", body=[*_, ast.Return(value=ast.expr() as value)]):
            yield value
        case ast.Return(value=ast.expr() as value) if file in LISTS:
            yield value


@cache
def every_message() -> dict[str, str]:
    """Message → a file that has it."""
    found: dict[str, str] = {}
    sources = [*(ROOT / "workspace").rglob("*.py"), *(KERNELS / "custom_kernels").rglob("*.py")]
    for path in sorted(sources):
        where = module(path)
        scopes: dict[ast.AST, ast.AST] = {}
        for function in ast.walk(where.tree):  # inner functions come after outer ones
            if isinstance(function, ast.FunctionDef):
                scopes |= dict.fromkeys(ast.walk(function), function)
        for node in ast.walk(where.tree):
            for expression in shown(node, path.name):
                for message in messages(expression, where, scopes.get(node, where.tree)):
                    found.setdefault(message, str(path.relative_to(ROOT)))
    return {message: file for message, file in found.items() if message not in NOT_ERRORS}


@cache
def entries() -> list[list[str]]:
    """The quoted words of each row."""
    rows = re.findall(r"^\| (`.*?) \| .* \|$", PAGE.read_text(), re.MULTILINE)
    return [re.findall(r"`([^`]+)`", row) for row in rows]


def is_quoted(words: str, message: str) -> bool:
    """Whether an entry's words are all of the message, or a part of it and no other message."""
    return words == message or (words in message and words not in every_message())


def test_every_error_has_exactly_one_entry() -> None:
    wrong = {}
    for message, file in every_message().items():
        rows = [row for row in entries() if any(is_quoted(words, message) for words in row)]
        if len(rows) != 1:
            wrong[f"{file}: {message}"] = rows
    assert wrong == {}


def test_every_entry_quotes_errors_that_exist() -> None:
    stale = [
        words
        for row in entries()
        for words in row
        if not any(is_quoted(words, message) for message in every_message())
    ]
    assert stale == []


def test_the_page_can_be_read() -> None:
    assert len(PAGE.read_text().splitlines()) <= 480
