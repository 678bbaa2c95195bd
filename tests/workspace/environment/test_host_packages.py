# SPDX-License-Identifier: Apache-2.0
"""An environment with a torch of its own beside a host's packages."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from workspace.environment import host_packages, inventory
from workspace.host.errors import WorkspaceError

LINKED = next(Path(sysconfig.get_path("purelib")).glob("torch/_C.*.so"))
"""A library that is linked with torch's."""


def install(site: Path, name: str, module: str) -> None:
    """A distribution of version 1.0 with one module or library, named as in ``a/b.so``."""
    path, info = site / module, site / f"{name}-1.0.dist-info"
    path.parent.mkdir(parents=True, exist_ok=True)
    info.mkdir()
    path.symlink_to(LINKED) if path.suffix == ".so" else path.write_text("")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{module},sha256=x,1\n{info.name}/METADATA,,\n../../bin/x,,\n")


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """The packages of a host: torch, one that is compiled against it, and one that is not."""
    site = tmp_path / "host"
    for name, module in (("torch", "torch/__init__.py"), ("flash_attn", "flash_attn/_C.so"),
                         ("plain", "plain.py"), ("triton", "triton/__init__.py")):  # fmt: skip
        install(site, name, module)
    for name in ("cu13/lib/libcublas.so.13", "cudnn/lib/libcudnn.so.9", "cu13/lib/note.txt"):
        (site / "nvidia" / name).parent.mkdir(parents=True, exist_ok=True)
        (site / "nvidia" / name).write_text("the host's")
    return site


@pytest.fixture
def bundled(tmp_path: Path) -> list[Path]:
    (tmp_path / "bundle").mkdir()
    path = tmp_path / "bundle" / "requirements.txt"
    path.write_text("torch==2.13.0 --hash=sha256:0\ntriton==3.7.1 --hash=sha256:0\n")
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps({"hosts_own": {"plain": {}}}))
    return [path]


def test_a_library_that_is_linked_with_torch_is_told_from_another(tmp_path: Path) -> None:
    assert inventory.links_torch(str(LINKED))
    for content in (b"", b"\x7fELF\x02\x01", b"\x7fELF\x02\x01" + b"\xff" * 99, b"text"):
        (tmp_path / "x.so").write_bytes(content)
        assert not inventory.links_torch(str(tmp_path / "x.so"))
    assert not inventory.links_torch(str(tmp_path / "missing.so"))
    assert "libc.so.6" in inventory.linked_libraries(str(LINKED))


def test_what_is_compiled_for_the_hosts_torch_is_not_seen_and_all_else_is(
    host: Path, bundled: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packages = tmp_path / "env" / "site-packages"
    own = packages / "nvidia" / "cudnn" / "lib" / "libcudnn.so.9"
    own.parent.mkdir(parents=True)
    own.write_text("the bundle's")
    missing = tmp_path / "no-user-site"
    (links,) = host_packages.show(tmp_path / "env", packages, [missing, host], bundled)
    seen = {name.metadata["Name"] for name in metadata.distributions(path=[str(links)])}
    assert seen == {"plain"}
    assert {path.name for path in links.iterdir()} == {"plain.py", "plain-1.0.dist-info", "nvidia"}
    assert "compiled for the host's torch, so not in env: flash-attn 1.0" in capsys.readouterr().err
    # torch finds every library in the environment: its own, or the host's by a link.
    assert own.read_text() == "the bundle's"
    assert (packages / "nvidia/cu13/lib/libcublas.so.13").read_text() == "the host's"
    assert not (packages / "nvidia/cu13/lib/note.txt").exists()


def test_a_bundle_that_counts_on_a_package_for_the_hosts_torch_is_refused(
    host: Path, bundled: list[Path], tmp_path: Path
) -> None:
    manifest = bundled[0].parent / "manifest.json"
    manifest.write_text(json.dumps({"hosts_own": {"flash-attn": {}, "plain": {}}}))
    with pytest.raises(WorkspaceError, match="counts on flash-attn of the host"):
        host_packages.show(tmp_path / "env", tmp_path / "env", [host], bundled)


def test_a_folder_that_a_pth_file_adds_with_something_for_another_torch_is_refused(
    host: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    interpreter = environment / "bin" / "python"
    host_packages.require_one_torch(interpreter, "python3")
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "editable.pth").write_text(f"{host}\n")
    with pytest.raises(
        WorkspaceError, match=r"host, which a \.pth file of python3 adds, has flash"
    ):
        host_packages.require_one_torch(interpreter, "python3")
