# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import zipfile

import pytest

from tests.workspace.conftest import wheel_bytes
from workspace import install
from workspace.fork_tree import git
from workspace.paths import FORK_SRC

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
def test_the_version_names_the_device(device: str, label: str) -> None:
    """vLLM takes its CPU platform when its version contains `cpu`."""
    assert install.version_label("0.25.1", device, "13.0") == label  # type: ignore[arg-type]


@pytest.mark.skipif(not install.MANIFEST.exists(), reason="run make dev first")
def test_the_binaries_of_this_checkout_are_those_of_the_wheel() -> None:
    manifest = install.read_manifest()
    assert manifest["files"]
    for name, crc in manifest["files"].items():
        assert install._crc32(FORK_SRC / name) == crc, name


@pytest.mark.skipif(not install.MANIFEST.exists(), reason="run make dev first")
def test_git_in_the_fork_does_not_see_the_binaries() -> None:
    untracked = git("ls-files", "--others", "--exclude-standard", tree=FORK_SRC).splitlines()
    assert set(untracked).isdisjoint(install.read_manifest()["files"])
