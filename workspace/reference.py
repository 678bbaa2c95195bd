# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/reference.md, made from the table of verbs: `python3 -m workspace.reference`
writes them."""

from __future__ import annotations

from collections.abc import Iterator

from workspace.host.files import write_file
from workspace.host.options import Option, declared
from workspace.host.paths import ROOT
from workspace.host.settings import Settings
from workspace.verbs import VERBS

PAGE = ROOT / "docs" / "reference.md"
COMMAND = "python3 -m workspace.reference"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _value(option: Option) -> str:
    given = ", ".join(f"`{value}`" for value in option.values)
    return f"{given}: {option.help}" if given and "`" not in option.help else option.help


def verbs() -> Iterator[str]:
    """Each verb with its variables."""
    yield "| verb | what it does | variables |"
    yield "|---|---|---|"
    for verb in VERBS.values():
        if not verb.internal:
            names = " ".join(f"`{_cell(one.usage)}`" for _, one in declared(verb.options))
            yield f"| `make {verb.name}` | {_cell(verb.help)} | {names} |"


def settings() -> Iterator[str]:
    """What selects the environment, for every verb."""
    yield "| variable | what it selects | default |"
    yield "|---|---|---|"
    for _, option in declared(Settings):
        yield f"| `{option.variable}` | {_cell(_value(option))} | {_cell(option.default)} |"


def options() -> Iterator[str]:
    """Each variable; where verbs mean different things by it, once for each meaning."""
    found: dict[Option, list[str]] = {}
    for verb in VERBS.values():
        for _, option in declared(verb.options) if not verb.internal else ():
            found.setdefault(option, []).append(f"`{verb.name}`")
    yield "| variable | of | meaning | default |"
    yield "|---|---|---|---|"
    for option in sorted(found, key=lambda one: one.variable):
        of = ", ".join(found[option])
        meaning = _cell(_value(option))
        yield f"| `{option.variable}` | {of} | {meaning} | {_cell(option.default)} |"


def render(page: str) -> str:
    """The page with its tables as they should be."""
    for table in (verbs, settings, options):
        begin, end = f"<!-- table: {table.__name__} -->", "<!-- end -->"
        block = "\n".join([begin, *table(), end])
        before, _, rest = page.partition(begin)
        page = before + block + rest.partition(end)[2]
    return page


if __name__ == "__main__":
    write_file(PAGE, render(PAGE.read_text()).encode())
