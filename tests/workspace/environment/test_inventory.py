# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.workspace.conftest import BASE_PYTHON, Checkout
from workspace.bundle import target
from workspace.environment import create, inventory
from workspace.host.errors import WorkspaceError


def pythons() -> list[Path]:
    """Interpreters of this machine, of any version from 3.8 on."""
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = [*versions.glob("3.[89].*/bin/python3"), *versions.glob("3.1?.*/bin/python3")]
    return sorted(path.resolve() for path in found) or [Path(sys.executable)]


@pytest.mark.parametrize("python", pythons(), ids=lambda path: path.parts[-3])
def test_one_copied_file_tells_of_the_python_that_runs_it(python: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(inventory.__file__, tmp_path))
    result = subprocess.run(
        [python, "-I", copy.name], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    taken = json.loads(result.stdout)
    said = subprocess.run([python, "--version"], capture_output=True, text=True, check=True)
    assert said.stdout.split()[1] == taken["python"]["version"]
    assert taken["machine"] == os.uname().machine
    assert list(tmp_path.iterdir()) == [copy]


def test_the_packages_are_those_that_this_python_sees(tmp_path: Path) -> None:
    path = tmp_path / "inventory.json"
    inventory.main([str(path)])
    read = target.read(path)
    for name in ("torch", "typer", "packaging"):
        assert read.packages[name].version == metadata.version(name)
        assert read.packages[name].requires == (metadata.requires(name) or [])
    assert read.torch is not None
    assert read.torch.version.startswith(metadata.version("torch").split("+")[0])


def test_make_inventory_needs_no_environment_and_makes_none(small_checkout: Checkout) -> None:
    result = small_checkout.make("inventory")
    assert result.returncode == 0, result.stdout
    assert "make bundle TARGET=inventory.json" in result.stdout
    taken = target.read(small_checkout.root / "inventory.json")
    assert Path(taken.python.executable) == Path(small_checkout.env["PYTHON"])
    assert not small_checkout.python.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "is not an inventory"),
        ('{"format": 0}', "is not an inventory of this version"),
        ('{"format": 1}', "is not a complete inventory: machine"),
    ],
)
def test_what_is_not_an_inventory_is_refused_with_how_to_make_one(
    tmp_path: Path, content: str | None, says: str
) -> None:
    path = tmp_path / "inventory.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(WorkspaceError, match=says) as caught:
        target.read(path)
    assert "python3 inventory.py > inventory.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_headers_are_seen_where_a_compiler_would_see_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory.sysconfig, "get_path", lambda _name: str(tmp_path / "none"))
    monkeypatch.setenv("CPATH", f":{tmp_path}")
    assert inventory.headers() is None
    (tmp_path / "Python.h").touch()
    assert inventory.headers() == str(tmp_path)


def test_what_the_inventory_counts_is_what_set_up_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages in the user's own folder, say, and in a distribution's."""
    monkeypatch.setenv("PYTHONUSERBASE", str(tmp_path / "user"))
    monkeypatch.delenv("PYTHONNOUSERSITE", raising=False)
    query = (
        "import site, json, inventory; print(json.dumps([site.USER_SITE, inventory.packages()]))"
    )

    def packages(python: str) -> tuple[str, dict[str, dict[str, Any]]]:
        command = [python, "-c", query]
        folder = Path(inventory.__file__).parent
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return json.loads(said.stdout)

    user_site, _ = packages(BASE_PYTHON)
    installed = Path(user_site) / "torch-2.11.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n")
    create._system_environment(tmp_path / "overlay", BASE_PYTHON, [])
    counted = packages(BASE_PYTHON)[1]
    assert counted["torch"]["version"] == "2.11.0"
    assert packages(str(tmp_path / "overlay/bin/python"))[1] == counted
