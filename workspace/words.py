# SPDX-License-Identifier: Apache-2.0
"""Things and numbers of them, in messages. Standard library only."""


def plural(count: int, word: str) -> str:
    """ "1 round", "2 rounds", "2 processes", "3 patches"."""
    ending = "" if count == 1 else "es" if word.endswith(("s", "ch")) else "s"
    return f"{count} {word}{ending}"


def some(names: list[str]) -> str:
    """The first three, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
