# SPDX-License-Identifier: Apache-2.0
"""Files that shadow the fork or a locked package are named, with their origin."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.workspace.conftest import Checkout
from workspace import doctor
from workspace.environment import imports
from workspace.host.paths import KERNELS
from workspace.pins.release import selected, tree

needs_dev = pytest.mark.skipif(
    not (Path(sys.prefix) / f"workspace-{selected()}.json").exists(), reason="run make dev first"
)


def write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


@needs_dev
def test_an_engine_would_import_the_fork_and_the_locked_packages() -> None:
    found = imports.probe(tree())
    assert found.shadowed == []
    assert found.versions["torch"] == metadata.version("torch")
    for name, folder in (("vllm", tree().resolve()), ("custom_kernels", KERNELS)):
        assert imports._locate(name)[0].resolve() == folder / name


@needs_dev
def test_every_module_that_is_shadowed_is_named_with_the_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a plugin of the user in the same folder shadows nothing."""
    mine, other, added = tmp_path / "mine", tmp_path / "other", tmp_path / "added"
    write(mine / "my_plugin/__init__.py", other / "vllm/__init__.py", other / "json/__init__.py")
    write(other / "nvidia/mine/__init__.py")  # a part of a namespace that nobody else has
    taken = next(
        Path(str(metadata.distribution("nvidia-cuda-runtime").locate_file("nvidia"))).iterdir()
    )
    write(other / "nvidia" / taken.name / "lib.py", added / "typer.py")
    (mine / "sitecustomize.py").write_text(f"import sys; sys.path.insert(0, {str(added)!r})\n")
    monkeypatch.setenv("PYTHONPATH", f"{mine}{os.pathsep}{other}")
    found = {module.module: module for module in imports.probe(tree()).shadowed}
    assert set(found) == {"vllm", "json", f"nvidia.{taken.name}", "typer"}
    assert found["vllm"].file == str(other / "vllm/__init__.py")
    assert found["vllm"].origin == "PYTHONPATH"
    assert found["vllm"].remedy == f"take {other} out of PYTHONPATH"
    assert str(mine / "sitecustomize.py") in found["typer"].origin


@needs_dev
def test_a_version_that_is_not_the_locked_one_is_seen_where_the_engine_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "torch-1.0.dist-info/METADATA")
    (tmp_path / "torch-1.0.dist-info/METADATA").write_text("Name: torch\nVersion: 1.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen = imports.probe(tree())
    assert doctor.packages("uv", seen).detail.endswith("differ from the lock: torch 1.0")


def test_packages_of_the_users_own_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "vllm.py")
    monkeypatch.setattr(imports.site, "getusersitepackages", lambda: str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    (module,) = imports.shadowed(tree())
    assert (module.module, module.file) == ("vllm", str(tmp_path / "vllm.py"))
    assert (module.origin, module.remedy) == (imports.USER_SITE, "export PYTHONNOUSERSITE=1")


def test_verbs_refuse_shadowed_modules_and_the_doctor_names_them(
    ready_checkout: Checkout, tmp_path: Path
) -> None:
    checkout = ready_checkout
    write(tmp_path / "vllm/__init__.py", tmp_path / "rich/__init__.py", tmp_path / "json.py")
    says = f"{tmp_path / 'vllm/__init__.py'} (PYTHONPATH)"
    result = checkout.make("kernels", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert f"vllm would be imported from {says}" in result.stdout
    assert f"take {tmp_path} out of PYTHONPATH" in result.stdout
    result = checkout.make("doctor", PYTHONPATH=str(tmp_path), COLUMNS="400")
    assert result.returncode != 0
    assert f"not from our fork: vllm would be imported from {says}" in result.stdout
    write(checkout.root / "typer.py")
    try:
        result = checkout.make("kernels")
    finally:
        (checkout.root / "typer.py").unlink()
    assert result.returncode != 0
    assert "typer.py (the folder that Python starts in)" in result.stdout
