# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.workspace.conftest import wheel_bytes
from workspace.environment import system_packages
from workspace.fork import install
from workspace.fork.built_from import manifest_path, read_manifest
from workspace.host.errors import WorkspaceError
from workspace.host.git import git
from workspace.host.paths import ROOT
from workspace.pins.model import Device, load
from workspace.pins.release import tree

TRACKED = {"setup.py", "vllm/__init__.py", "vllm/third_party/__init__.py"}


def test_only_what_the_release_lacks_is_taken_from_the_wheel() -> None:
    names = {
        "vllm/__init__.py": b"python of the wheel",
        "vllm/_C.abi3.so": b"binary",
        "vllm/third_party/made/code.py": b"fetched by upstream's build",
        "vllm-0.1.dist-info/METADATA": b"metadata",
    }
    with zipfile.ZipFile(io.BytesIO(wheel_bytes(names))) as wheel:
        taken = [member.filename for member in install.binary_members(wheel, TRACKED)]
    assert taken == ["vllm/_C.abi3.so", "vllm/third_party/made/code.py"]


def test_git_hides_what_was_taken_and_nothing_of_the_release() -> None:
    names = ["vllm/_C.abi3.so", "vllm/third_party/made/a/b.py", "vllm/third_party/made/c.py"]
    assert install.exclude_patterns(names, TRACKED) == [
        "/vllm/_C.abi3.so",
        "/vllm/third_party/made/",
    ]


@pytest.mark.parametrize(("device", "label"), [("cpu", "0.25.1+cpu"), ("cuda", "0.25.1+cu130")])
def test_the_version_names_the_device(device: Device, label: str) -> None:
    """vLLM takes its CPU platform when its version contains `cpu`."""
    assert install.version_label("0.25.1", device, "13.0") == label


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        ("2.11.0+cu130", r"torch 2\.11\.0, the binaries .* use .*: VLLM_VERSION=0\.25\.1, or set"),
        ("2.10.0", r"torch 2\.10\.0, the binaries of vLLM .* built for [\d.]+; set PYTHON= to one"),
    ],
)
def test_a_host_with_another_torch_is_told_which_release_is_built_for_it(
    torch: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = load().vllm.default
    monkeypatch.setattr(install.metadata, "version", lambda _: torch)
    with pytest.raises(WorkspaceError, match=said):
        install.require_torch(default)
    monkeypatch.setattr(install.metadata, "version", lambda _: load().release(default).torch)
    install.require_torch(default)


@pytest.mark.skipif(not manifest_path().exists(), reason="run make dev first")
def test_the_binaries_of_this_checkout_are_those_of_the_wheel() -> None:
    manifest = read_manifest()
    assert manifest.files
    for name, crc in manifest.files.items():
        assert install.checksum(tree() / name) == crc, name


@pytest.mark.skipif(not manifest_path().exists(), reason="run make dev first")
def test_git_in_the_fork_does_not_see_the_binaries() -> None:
    untracked = git("ls-files", "--others", "--exclude-standard", tree=tree()).splitlines()
    assert set(untracked).isdisjoint(read_manifest().files)


def test_a_bare_system_gets_what_it_lacks_from_the_distribution(tmp_path: Path) -> None:
    """Real apt and dpkg, into a folder of our own: nothing is installed and root is not needed."""
    if not shutil.which("apt-get"):
        pytest.skip("needs Debian's or Ubuntu's apt-get")
    code = (
        "from pathlib import Path; import sys; from workspace.environment import system_packages; "
        "system_packages.TOOLS = Path(sys.argv[1]); "
        "print(system_packages.unpack('libnuma1', 'a test'))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    for _ in range(2):  # the second time from what is there
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(tmp_path / "libnuma1")
    assert [path.name for path in tmp_path.iterdir()] == ["libnuma1"]
    (library,) = (tmp_path / "libnuma1").glob("usr/lib/*/libnuma.so.1")
    ctypes.CDLL(str(library))


def test_what_is_brought_along_is_there_in_every_later_python(tmp_path: Path) -> None:
    """A library and headers of a test's own, in a new environment over this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    host = [path for path in sys.path if path.endswith("-packages")]
    line = "import os; added = '/a:/b'; os.environ.update(CPATH=added)"
    code = (
        f"import sys; sys.path += {host!r}; sys.path.insert(0, {str(ROOT)!r}); "
        f"from workspace.fork import install; install._at_startup('test', {line!r}); "
        "import os; print(os.environ['CPATH'])"
    )
    here = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    later = subprocess.run(
        [python, "-c", "import os; print(os.environ['CPATH'])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert here.stdout == later.stdout == "/a:/b\n"


def test_without_apt_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_packages, "TOOLS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WorkspaceError, match="a reason; install your distribution's libnuma1"):
        system_packages.unpack("libnuma1", "a reason")
