# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/reference.md, generated from verbs.py by `python3 -m workspace.reference`."""

from __future__ import annotations

from collections.abc import Iterator

from workspace.host.files import write_file
from workspace.host.options import Option, declared
from workspace.host.paths import ROOT
from workspace.host.settings import Settings
from workspace.host.text import with_blocks
from workspace.verbs import VERBS

PAGE = ROOT / "docs" / "reference.md"
COMMAND = "python3 -m workspace.reference"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _meaning(option: Option) -> str:
    values = ", ".join(f"`{value}`" for value in option.values)
    return _cell(f"{values}: {option.help}" if values and "`" not in option.help else option.help)


def verbs() -> Iterator[str]:
    """Each verb with its variables."""
    yield "| verb | what it does | variables |"
    yield "|---|---|---|"
    for verb in VERBS.values():
        if not verb.internal:
            names = " ".join(f"`{_cell(option.usage)}`" for _, option in declared(verb.options))
            yield f"| `make {verb.name}` | {_cell(verb.help)} | {names} |"


def settings() -> Iterator[str]:
    """The variables of every verb, which select the environment."""
    yield "| variable | what it selects | default |"
    yield "|---|---|---|"
    for _, option in declared(Settings):
        yield f"| `{option.variable}` | {_meaning(option)} | {_cell(option.default)} |"


def options() -> Iterator[str]:
    """The variables of single verbs, once for each meaning."""
    users: dict[Option, list[str]] = {}
    for verb in VERBS.values():
        for _, option in declared(verb.options) if not verb.internal else ():
            users.setdefault(option, []).append(f"`{verb.name}`")
    yield "| variable | of | meaning | default |"
    yield "|---|---|---|---|"
    for option in sorted(users, key=lambda option: option.variable):
        cells = (", ".join(users[option]), _meaning(option), _cell(option.default))
        yield f"| `{option.variable}` | {' | '.join(cells)} |"


def render(page: str) -> str:
    """The page with current tables."""
    return with_blocks(page, "table", {"verbs": verbs, "settings": settings, "options": options})


if __name__ == "__main__":
    write_file(PAGE, render(PAGE.read_text()).encode())
