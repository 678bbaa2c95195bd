# SPDX-License-Identifier: Apache-2.0
"""Numbers of things, in messages. Standard library only."""


def plural(count: int, word: str) -> str:
    """ "1 round", "2 rounds", "2 processes", "3 patches"."""
    ending = "" if count == 1 else "es" if word.endswith(("s", "ch")) else "s"
    return f"{count} {word}{ending}"
