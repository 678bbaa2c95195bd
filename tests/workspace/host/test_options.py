# SPDX-License-Identifier: Apache-2.0
"""Make variables become typed options, or one clear error."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from workspace.host import settings
from workspace.host.errors import WorkspaceError
from workspace.host.options import choice, flag, number, read, text


@dataclass(frozen=True)
class Sample:
    name: str | None = text("NAME", "a name")
    jobs: int | None = number("JOBS", "how many", example="3", most=64)
    force: bool = flag("FORCE", "all the same")
    build: str | None = choice("BUILD", "how", "full", "precompiled", "none")


def test_what_is_given_is_read_with_its_type() -> None:
    given = {"NAME": "a b", "JOBS": " 4 ", "FORCE": "1", "BUILD": "full", "OTHER": "x"}
    assert read(Sample, given) == Sample("a b", 4, True, "full")


@pytest.mark.parametrize("given", [{}, dict.fromkeys(("NAME", "JOBS", "FORCE", "BUILD"), "")])
def test_unset_and_empty_are_not_given(given: dict[str, str]) -> None:
    assert read(Sample, given) == Sample() == Sample(None, None, False, None)


def test_a_flag_can_be_said_to_be_off() -> None:
    assert read(Sample, {"FORCE": "0"}).force is False


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("FORCE", "yes", "FORCE=yes is not known; use FORCE=1 or leave it out"),
        ("JOBS", "0", "JOBS=0 is not a number from 1 up; use e.g. JOBS=3"),
        ("JOBS", "-1", "JOBS=-1 is not a number from 1 up; use e.g. JOBS=3"),
        ("JOBS", "many", "JOBS=many is not a number from 1 up; use e.g. JOBS=3"),
        ("JOBS", "1.5", "JOBS=1.5 is not a number from 1 up; use e.g. JOBS=3"),
        ("JOBS", "²", "JOBS=² is not a number from 1 up; use e.g. JOBS=3"),
        ("JOBS", "65", "JOBS=65 is more than 64; use less"),
        ("BUILD", "ful", "BUILD=ful is not known; use BUILD=full, BUILD=precompiled or BUILD=none"),
    ],
)
def test_a_value_that_cannot_be_is_one_line_with_those_that_can(
    variable: str, value: str, says: str
) -> None:
    with pytest.raises(WorkspaceError) as error:
        read(Sample, {variable: value})
    assert str(error.value) == says


def test_settings_are_handed_on_by_the_workspaces_own_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for names in settings.EXPORTED.items():
        for variable in names:
            monkeypatch.setenv(variable, "")
    monkeypatch.setenv("ENV", "conda")
    monkeypatch.setenv("WORKSPACE_ENV", "uv")  # of a make around this one
    monkeypatch.setenv("WORKSPACE_DEVICE", "cpu")
    chosen = settings.current()
    assert chosen == settings.Settings("conda", "cpu", None, None)
    settings.export(chosen)
    assert os.environ["WORKSPACE_ENV"] == "conda"
    assert {"ENV", "DEVICE", "WORKSPACE_PYTHON", "WORKSPACE_RELEASE"}.isdisjoint(os.environ)
    assert settings.current() == chosen
