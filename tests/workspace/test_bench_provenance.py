# SPDX-License-Identifier: Apache-2.0
"""Sources of a run: commits, whether they were dirty, and the locks' hashes."""

import hashlib
import subprocess
from pathlib import Path

from workspace.bench import provenance


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)


def test_commit_and_dirtiness_are_those_of_the_tree(tmp_path: Path) -> None:
    assert provenance.git_state(tmp_path / "nowhere") is None
    git(tmp_path, "init", "-q")
    assert provenance.git_state(tmp_path) is None  # nothing committed yet
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = provenance.git_state(tmp_path)
    assert clean is not None
    assert len(clean.commit) == 40
    assert not clean.dirty
    (tmp_path / "a.py").write_text("2")
    assert provenance.git_state(tmp_path) == clean.model_copy(update={"dirty": True})


def test_vllm_from_a_wheel_does_not_pass_for_the_checkout() -> None:
    assert provenance.fork_state(Path(provenance.__file__).parent) is None


def test_every_lock_is_hashed(tmp_path: Path) -> None:
    (tmp_path / "cpu.txt").write_bytes(b"torch==2.11.0\n")
    expected = hashlib.sha256(b"torch==2.11.0\n").hexdigest()
    assert provenance.lock_hashes(tmp_path) == {"cpu.txt": expected}
    assert provenance.lock_hashes(tmp_path / "none") == {}
