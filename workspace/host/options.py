# SPDX-License-Identifier: Apache-2.0
"""Make variables as the fields of a dataclass, read and checked in one place.

    @dataclass(frozen=True)
    class Kernels:
        arch: str | None = text("ARCH", "GPU architectures", "all that are pinned")

    read(Kernels, os.environ).arch

An empty variable counts as unset, because make cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from workspace.host.errors import WorkspaceError

Options = TypeVar("Options")


@dataclass(frozen=True)
class Option:
    """One make variable.

    Args:
        variable: its name.
        help: what it means.
        kind: how it is parsed; a number is whole and at least 1.
        values: of a choice.
        example: a value as a user could type it.
        default: text that describes the default.
        most: the largest valid number, if there is one.
    """

    variable: str
    help: str
    kind: Literal["text", "number", "flag", "choice"] = "text"
    values: tuple[str, ...] = ()
    example: str = ""
    default: str = ""
    most: int | None = None

    @property
    def usage(self) -> str:
        """`ARCH=9.0a`, `BUILD=full|precompiled`, `FORCE=1`, or the name alone."""
        value = {"flag": "1", "choice": "|".join(self.values)}.get(self.kind, self.example)
        return f"{self.variable}={value}" if value else self.variable

    def parse(self, given: str) -> str | int | bool | None:
        """The value for its field; without a value None, for a flag False.

        Raises:
            WorkspaceError: the value is not valid; the message names valid ones.
        """
        value = given if self.kind == "text" else given.strip()
        if self.kind == "flag":
            if value not in ("", "0", "1"):
                raise WorkspaceError(
                    f"{self.variable}={value} is not known; use {self.variable}=1 or leave it out"
                )
            return value == "1"
        if not value:
            return None
        if self.kind == "choice" and value not in self.values:
            *first, last = (f"{self.variable}={one}" for one in self.values)
            raise WorkspaceError(
                f"{self.variable}={value} is not known; use {', '.join(first)} or {last}"
            )
        if self.kind != "number":
            return value
        if not (value.isascii() and value.isdecimal() and int(value)):
            raise WorkspaceError(
                f"{self.variable}={value} is not a number from 1 up; use e.g. "
                f"{self.variable}={self.example or 4}"
            )
        if self.most is not None and int(value) > self.most:
            raise WorkspaceError(f"{self.variable}={value} is more than {self.most}; use less")
        return int(value)


def _declare(option: Option) -> Any:
    return field(default=option.parse(""), metadata={"option": option})


def text(variable: str, help: str, default: str = "", example: str = "") -> Any:
    return _declare(Option(variable, help, "text", (), example, default))


def number(
    variable: str, help: str, default: str = "", example: str = "", most: int | None = None
) -> Any:
    return _declare(Option(variable, help, "number", (), example, default, most))


def flag(variable: str, help: str) -> Any:
    return _declare(Option(variable, help, "flag"))


def choice(variable: str, help: str, *values: str, default: str = "") -> Any:
    return _declare(Option(variable, help, "choice", values, "", default))


def declared(kind: type) -> Iterator[tuple[str, Option]]:
    """The fields of such a dataclass with their variables."""
    for entry in fields(kind):
        yield entry.name, entry.metadata["option"]


def read(kind: type[Options], variables: Mapping[str, str]) -> Options:
    """An object with the values of these variables.

    Raises:
        WorkspaceError: the first value that is not valid.
    """
    return kind(**{name: it.parse(variables.get(it.variable, "")) for name, it in declared(kind)})
