# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from workspace.host.errors import WorkspaceError
from workspace.host.paths import PINS, ROOT
from workspace.pins import model

DERIVED = ("pins.toml", "environment.yml", "locks/", "vllm-fork/patches/")
EXACT = r"\d+\.\d+\.\d+(?:\.\d+)*"


@pytest.mark.parametrize("version", sorted(model.load().vllm.release))
def test_the_pins_of_each_release_are_complete(version: str) -> None:
    release = model.load().release(version)
    assert release.sdist.filename.startswith(f"vllm-{version}")
    assert {"cuda", "cpu"} == set(release.binaries)
    assert re.fullmatch(r"[0-9a-f]{40}", release.tree)


def test_the_releases_of_older_hosts_are_supported_beside_the_default_one() -> None:
    pins = model.load()
    assert {"0.25.1", "0.13.0"} <= set(pins.vllm.release) - {pins.vllm.default}
    assert pins.built_for("2.11.0") == "0.25.1"
    assert pins.built_for("2.10.0") is None


def test_where_wheels_serve_one_python_each_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    release = model.load().release("0.13.0")
    monkeypatch.setattr(model.platform, "machine", lambda: "x86_64")
    for python in model.load().python.supported:
        monkeypatch.setattr(model, "python_version", lambda python=python: python)
        tag = f"-cp{python.replace('.', '')}-"
        assert tag in release.binary("cpu").filename
        assert "-abi3-" in release.binary("cuda").filename


def test_a_python_without_a_wheel_is_told_which_ones_have_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(model, "python_version", lambda: "3.13")
    with pytest.raises(
        WorkspaceError, match=r"with Python 3\.13; set PYTHON= to one of 3\.11, 3\.12"
    ):
        model.load().release("0.13.0").binary("cpu")


@pytest.mark.parametrize(
    ("pattern", "replacement", "named"),
    [
        (r'sha256 = "d2c', 'sha256 = "xyz', "sdist.sha256"),
        (r'^torch = ".*"', "", "torch"),
        (r"^\[uv\]", "[uvw]", "uv"),
        (r'^version = "', "version = ", "not valid TOML"),
        (r'"9\.0a"', '"sm_90"', "architectures"),
    ],
)
def test_a_wrong_entry_is_named_in_one_line(
    tmp_path: Path, pattern: str, replacement: str, named: str
) -> None:
    path = tmp_path / "pins.toml"
    changed, count = re.subn(pattern, replacement, PINS.read_text(), count=1, flags=re.MULTILINE)
    assert count == 1
    path.write_text(changed)
    with pytest.raises(WorkspaceError) as error:
        model.read(path)
    assert named in str(error.value)
    assert "\n" not in str(error.value).strip()


def test_a_missing_file_says_how_to_get_it_back(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="git checkout"):
        model.read(tmp_path / "pins.toml")


def test_an_unknown_release_lists_those_there_are() -> None:
    with pytest.raises(WorkspaceError, match=r"0\.99\.0 is not pinned; pins.toml has 0\.32\.0"):
        model.load().release("0.99.0")


def test_versions_stand_in_the_pins_and_nowhere_else_by_hand() -> None:
    """A version of a pinned package in our code would drift from the pins unnoticed."""
    numbers = {
        number
        for release in model.load().vllm.release.values()
        for number in (
            *release.cuda.wheels.values(), *release.cuda.libraries.values(), release.triton
        )
        if re.fullmatch(EXACT, number)
    }  # fmt: skip
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "Makefile", "*.sh", ".ci", ".devcontainer"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    found = [
        f"{name}: {number}"
        for name in tracked
        if not name.startswith((*DERIVED, "tests/")) and (ROOT / name).exists()
        for number in numbers
        if re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", (ROOT / name).read_text())
    ]
    assert found == []
