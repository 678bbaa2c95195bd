# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workspace.conftest import BASE_PYTHON, NOBODY, Checkout, path_with
from workspace.environment.python import find_python, supported_versions
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT
from workspace.pins.model import load

SUPPORTED = load().python.supported


def fake_python(path: Path, version: str | None) -> Path:
    """A command that says it is this Python; None: a shim without a Python behind it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\n" if version else "#!/bin/sh\nexit 127\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PATH, no pyenv, no PYTHON."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    return tmp_path / "bin"


def test_the_preferred_python_is_taken_when_several_are_there(path: Path) -> None:
    for version in ("3.11", "3.12", "3.13"):
        fake_python(path / f"python{version}", version)
    assert find_python() == str(path / f"python{SUPPORTED[0]}")


def test_a_shim_that_does_not_run_is_passed_over(path: Path, tmp_path: Path) -> None:
    fake_python(path / "python3.12", None)
    real = fake_python(tmp_path / "pyenv" / "versions" / "3.12.7" / "bin" / "python", "3.12")
    assert find_python() == str(real)


def test_an_old_python_only_is_one_clear_error(path: Path) -> None:
    fake_python(path / "python3", "3.9")
    with pytest.raises(WorkspaceError, match=r"no Python 3\.11, 3\.12, 3\.13 found"):
        find_python()


@pytest.mark.parametrize(
    ("version", "says"), [("3.9", "Python 3.9"), (None, "not a working Python")]
)
def test_a_wrong_PYTHON_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, says: str
) -> None:
    monkeypatch.setenv("PYTHON", str(fake_python(path / "mine", version)))
    with pytest.raises(WorkspaceError, match=says):
        find_python()


def test_supported_versions_are_read_as_the_pins_have_them() -> None:
    assert supported_versions() == SUPPORTED


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ENV": "venv"}, "ENV=venv is not known; use ENV=uv, ENV=conda or ENV=system"),
        ({"DEVICE": "tpu"}, "DEVICE=tpu is not known; use DEVICE=cuda or DEVICE=cpu"),
        ({"FORCE": "yes"}, "FORCE=yes is not known; use FORCE=1 or leave it out"),
        ({"PYTHON": "/no/python"}, "PYTHON=/no/python is not a working Python"),
    ],
)
def test_a_wrong_variable_is_one_line_and_no_traceback(
    small_checkout: Checkout, variables: dict[str, str], says: str
) -> None:
    result = small_checkout.make("dev", **variables)
    assert result.returncode != 0
    assert f"error: {says}" in result.stdout
    assert "Traceback" not in result.stdout


def test_an_index_out_of_reach_is_one_clear_error(small_checkout: Checkout, tmp_path: Path) -> None:
    nowhere = {
        "UV_DEFAULT_INDEX": f"{NOBODY}/simple",
        "UV_CACHE_DIR": str(tmp_path / "uv"),
        "UV_HTTP_RETRIES": "0",
    }
    result = small_checkout.make("dev", **nowhere)
    assert result.returncode != 0
    assert result.stdout.count("error: the locked packages could not be installed") == 1
    assert "check the network" in result.stdout
    assert "Traceback" not in result.stdout
    for tool in (small_checkout.root / ".workspace" / "tools").glob("uv-*"):
        shutil.rmtree(tool)
    nowhere = {"PIP_INDEX_URL": f"{NOBODY}/simple", "PIP_RETRIES": "0"}
    result = small_checkout.make("dev", **nowhere)
    assert result.returncode != 0
    assert "could not be fetched; check the network" in result.stdout
    assert "Traceback" not in result.stdout


def test_conda_without_a_conda_says_what_is_missing(
    small_checkout: Checkout, tmp_path: Path
) -> None:
    path = path_with(tmp_path / "bin", "sh", "make", "git")
    result = small_checkout.make("dev", ENV="conda", PATH=path, PYTHON="")
    assert "ENV=conda needs micromamba, mamba or conda on PATH" in result.stdout
    assert result.returncode != 0


def test_uv_is_fetched_through_pip_and_checked(small_checkout: Checkout) -> None:
    """The real download, by hash, with an interpreter that has pip."""
    tools = small_checkout.root / ".workspace" / "tools"
    for path in tools.rglob("uv"):
        if path.is_file():
            path.unlink()
    code = "from workspace.environment import python, uv; print(uv.obtain(python.find_python()))"

    def obtain() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BASE_PYTHON, "-c", code],
            cwd=small_checkout.root, env={**small_checkout.env, "PYTHON": BASE_PYTHON},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    result = obtain()
    assert result.returncode == 0, result.stderr
    version = subprocess.run(
        [result.stdout.strip(), "--version"], capture_output=True, text=True, check=True
    )
    assert load().uv.version in version.stdout
    pins = (small_checkout.root / "pins.toml").read_text()
    (small_checkout.root / "pins.toml").write_text(
        pins.replace(load().uv.sha256[os.uname().machine], "0" * 64)
    )
    Path(result.stdout.strip()).unlink()
    assert obtain().returncode != 0
    assert not Path(result.stdout.strip()).exists()


def test_the_doctor_of_a_fresh_clone_sets_nothing_up(small_checkout: Checkout) -> None:
    result = small_checkout.make("doctor")
    assert "not set up; run: make dev" in result.stdout
    assert result.returncode != 0
    answer = json.loads(small_checkout.make("doctor", "JSON=1").stdout.split("\nmake")[0])
    assert answer["usable"] is False
    assert not small_checkout.python.exists()


def test_our_kernels_folder_does_not_pass_for_the_package_of_that_name() -> None:
    """Where the checkout's root were on PYTHONPATH, transformers could take it for one."""
    code = (
        "import importlib.util; from transformers.utils import is_kernels_available; "
        "print(is_kernels_available())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(("checkout", "there"), [(str(ROOT), True), ("/another", False)])
def test_an_environment_outside_serves_only_the_checkout_that_it_is_for(
    tmp_path: Path, checkout: str, there: bool
) -> None:
    code = "from workspace.pins import release; print(release.environment('uv', '0.0').parent)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "WORKSPACE_HOME": str(tmp_path), "WORKSPACE_HOME_FOR": checkout},
    ).stdout.strip()  # fmt: skip
    assert found == str(tmp_path if there else ROOT)
