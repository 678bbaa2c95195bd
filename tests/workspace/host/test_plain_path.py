# SPDX-License-Identifier: Apache-2.0
"""Names of folders that tools cannot take. That every verb works in such a folder is for the other
tests to show: the small checkouts lie in one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.workspace.conftest import ODD, Checkout
from workspace.host.errors import WorkspaceError
from workspace.host.plain_path import PLAIN, plain, require_usable


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORKSPACE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / ODD
    folder.mkdir(parents=True)
    return folder


def test_a_folder_with_a_plain_name_stays_what_it_is(tmp_path: Path, odd: Path) -> None:
    assert plain(tmp_path) == tmp_path
    assert plain(tmp_path / "grüße_1.0-a") == tmp_path / "grüße_1.0-a"
    assert not (tmp_path / "cache").exists()


def test_another_one_gets_a_link_in_the_cache_and_links_of_removed_ones_go(
    tmp_path: Path, odd: Path
) -> None:
    gone = plain(odd / "gone")
    link = plain(odd)
    assert PLAIN.fullmatch(str(link))
    assert link.parents[1] == tmp_path / "cache"
    assert link.resolve() == odd
    assert plain(odd) == link
    assert not gone.is_symlink()


def test_a_link_is_made_only_where_nobody_else_can_replace_it(
    odd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = plain(odd).parent
    assert plain(odd).parent == links
    links.chmod(0o777)
    assert plain(odd).parent == Path("/tmp") / links.name
    links.chmod(0o700)
    monkeypatch.setenv("WORKSPACE_CACHE", str(odd))  # not plain itself
    assert plain(odd).parent == Path("/tmp") / links.name


@pytest.mark.parametrize(
    "name", ["a:b", "a\nb", os.fsdecode(b"a\xffb"), "$HOME", "{it}", "`it`", 'a"b', "a\\b"]
)
def test_a_path_that_cannot_be_held_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(WorkspaceError, match="move the checkout") as error:
        require_usable(Path("/work", name))
    message = str(error.value)
    assert message.isprintable()
    message.encode()


def test_whatever_else_is_in_its_path_a_checkout_is_set_up(
    small_checkout: Checkout, tmp_path: Path
) -> None:
    place = tmp_path / "#1 100% [x] *? a;b&c|d,e~=!<f>"
    require_usable(place)
    small_checkout.root = small_checkout.root.rename(place)
    result = small_checkout.make("dev")
    assert result.returncode == 0, result.stdout
    assert small_checkout.make("dev").stdout.strip() == "· ready"


def test_what_a_verb_starts_sees_its_environment_and_the_temporary_folder_by_plain_names(
    ready_checkout: Checkout, tmp_path: Path
) -> None:
    (tmp_path / ODD).mkdir(parents=True)
    (site,) = ready_checkout.root.glob(".venv/lib/python*/site-packages")
    shown = site / "shown.pth"
    shown.write_text("import os, sys; print(f'{sys.prefix}\\n{os.environ[\"TMPDIR\"]}')\n")
    try:
        output = ready_checkout.make("compare", TMPDIR=str(tmp_path / ODD)).stdout
    finally:
        shown.unlink()
    prefix, temporary = output.splitlines()[:2]
    for path, is_really in (
        (prefix, ready_checkout.root / ".venv"),
        (temporary, tmp_path / ODD),
    ):
        assert PLAIN.fullmatch(path), output
        assert Path(path).resolve() == is_really.resolve()


def test_a_python_that_is_started_directly_imports_by_plain_names(
    ready_checkout: Checkout,
) -> None:
    own = ready_checkout.root / ".venv"

    def packages() -> Path:
        command = [own / "bin" / "python", "-c", "import packaging; print(packaging.__file__)"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        return Path(shown.stdout.strip()).parents[1]

    named = packages()
    assert PLAIN.fullmatch(str(named))
    assert named.resolve().is_relative_to(own)
    link = named.parents[3]
    link.unlink()  # with whatever else the user's cache folder held
    assert packages().is_relative_to(own)
    assert ready_checkout.make("dev").returncode == 0
    assert packages() == named
