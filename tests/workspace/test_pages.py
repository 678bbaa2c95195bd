# SPDX-License-Identifier: Apache-2.0
"""Links of the pages lead somewhere, and their `make` commands are such as make takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from workspace.host.git import git
from workspace.host.options import declared
from workspace.host.paths import ROOT
from workspace.host.settings import Settings
from workspace.verbs import VERBS

PAGES = [ROOT / name for name in git("ls-files", "-z", "*.md", tree=ROOT).split("\0") if name]
BLOCK = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)


def by_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return frozenset(
        f"{name}-{number}" if number else name
        for name, last in found.items()
        for number in range(last + 1)
    )


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def commands(text: str) -> Iterator[str]:
    """The `make` commands in blocks and in code of a page."""
    blocks = BLOCK.findall(text) + re.findall(r"(?:^ {4,}.*\n)+", text, re.MULTILINE)
    code = re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
    for line in [*(line for block in blocks for line in block.splitlines()), *code]:
        for command in re.split(r" && | #| {2,}", re.sub(r"<[^>]*>", "<>", line.strip())):
            if re.match(r"[\s$]*(?:[A-Z_]+=\S* )*make [a-z]", command):
                yield command.strip(" $")


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_commands_name_verbs_and_variables_that_exist(page: Path) -> None:
    for command in commands(page.read_text()):
        words = [word.rstrip(",") for word in shlex.split(command)]
        given = dict(word.split("=", 1) for word in words if "=" in word)
        verbs = [word for word in words if "=" not in word and word != "make"]
        for name in verbs:
            assert name in VERBS or name == "help", command
        options = {
            option.variable: option
            for kind in (Settings, *(VERBS[name].options for name in verbs if name in VERBS))
            for _, option in declared(kind)
        }
        for variable, value in given.items():
            assert variable in options, command
            if not re.search(r"…|\.\.\.|<", value):
                options[variable].parse(value)
