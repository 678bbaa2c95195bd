# SPDX-License-Identifier: Apache-2.0
"""Parts of messages: a line of progress, counts, commands to copy."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping


def say(message: str) -> None:
    print(f"· {message}", file=sys.stderr, flush=True)


def plural(count: int, word: str) -> str:
    """ "1 round", "2 rounds", "2 processes", "3 patches"."""
    ending = "" if count == 1 else "es" if word.endswith(("s", "ch")) else "s"
    return f"{count} {word}{ending}"


def some(names: list[str]) -> str:
    """The first three, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def last_line(output: str) -> str:
    """The last line of a program's error output: usually the reason of the failure."""
    return (output.strip().splitlines() or ["no message"])[-1]


def duration(seconds: float) -> str:
    """ "45 s", "4 min": rounded as an estimate is."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def make_command(verb: str, **variables: object) -> str:
    """`make VERB NAME=value …` for a shell, without the variables that are None."""
    words = [
        # make expands what a shell hands it: a $ is written twice.
        f"{name}={shlex.quote(str(value).replace('$', '$$'))}"
        for name, value in variables.items()
        if value is not None
    ]
    return " ".join(["make", verb, *words])


def with_blocks(page: str, kind: str, blocks: Mapping[str, Callable[[], Iterable[str]]]) -> str:
    """A page with current lines from `<!-- KIND: NAME -->` to `<!-- end -->`.

    Raises:
        KeyError: a name in the page is not among the blocks.
    """

    def lines(found: re.Match[str]) -> str:
        return "\n".join([found[1], *blocks[found[2]](), "<!-- end -->"])

    return re.sub(rf"(<!-- {kind}: (\w+) -->).*?<!-- end -->", lines, page, flags=re.DOTALL)
