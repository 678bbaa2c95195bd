# SPDX-License-Identifier: Apache-2.0
"""BASELINE=pristine: the release's files with the fork's binaries, and nothing of the user's."""

import subprocess
from pathlib import Path

import pytest

from workspace.bench import pristine
from workspace.fork import tree_state
from workspace.host.errors import WorkspaceError

TAG = "upstream/0.25.1"


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    source = tmp_path / "src"
    (source / "vllm").mkdir(parents=True)
    git(tmp_path, "init", "-q", str(source))
    (source / ".gitignore").write_text("*.so\n_version.py\n__pycache__/\n")
    (source / "vllm" / "envs.py").write_text("release\n")
    git(source, "add", ".")
    git(source, "commit", "-qm", "release")
    git(source, "tag", TAG)
    (source / "vllm" / "envs.py").write_text("patched\n")
    git(source, "commit", "-qam", "patch")
    (source / "vllm" / "_C.abi3.so").write_bytes(b"binary")
    (source / "vllm" / "_version.py").write_text("0.25.1")
    (source / "vllm" / "mine.py").write_text("the user's new file")
    (source / "vllm" / "envs.py").write_text("edited\n")
    return source


def test_tree_is_the_release_with_the_binaries_and_without_edits(
    fork: Path, tmp_path: Path
) -> None:
    pinned = tree_state.git("rev-parse", f"{TAG}^{{tree}}", tree=fork).strip()
    for _ in range(2):  # made anew each time
        tree = pristine.make_tree(fork, tmp_path / "trees" / "pristine", TAG, pinned)
        assert (tree / "vllm" / "envs.py").read_text() == "release\n"
        assert (tree / "vllm" / "_C.abi3.so").read_bytes() == b"binary"
        assert (tree / "vllm" / "_version.py").read_text() == "0.25.1"
        assert not (tree / "vllm" / "mine.py").exists()
    compiled_here = {"vllm/_C.abi3.so"}
    tree = pristine.make_tree(fork, tmp_path / "trees" / "pristine", TAG, pinned, compiled_here)
    assert not (tree / "vllm" / "_C.abi3.so").exists()
    assert [p.name for p in (tmp_path / "trees").iterdir()] == ["pristine"]
    assert (fork / "vllm" / "envs.py").read_text() == "edited\n"


def test_what_is_not_the_release_is_one_line(fork: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="pinned is 000000000000, so it is not the release"):
        pristine.make_tree(fork, tmp_path / "tree", TAG, "0" * 40)
    git(fork, "tag", "-d", TAG)
    with pytest.raises(WorkspaceError, match=f"no tag {TAG}; run make dev"):
        pristine.make_tree(fork, tmp_path / "tree", TAG, "")
