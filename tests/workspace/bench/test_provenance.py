# SPDX-License-Identifier: Apache-2.0
"""Sources of a run: commits, whether they were dirty, and the locks' hashes."""

import hashlib
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from workspace.bench import provenance
from workspace.fork import built_from
from workspace.fork.built_from import Build, BuiltFile, Manifest
from workspace.host.errors import WorkspaceError
from workspace.pins import release


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)


def test_commit_and_dirtiness_are_those_of_the_tree(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    with pytest.raises(WorkspaceError):
        provenance.git_state(tmp_path)  # nothing committed yet
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = provenance.git_state(tmp_path)
    assert len(clean.commit) == 40
    assert not clean.dirty
    (tmp_path / "a.py").write_text("2")
    assert provenance.git_state(tmp_path) == clean.model_copy(update={"dirty": True})
    (tmp_path / "inner").mkdir()
    with pytest.raises(WorkspaceError, match="not a git repository"):
        provenance.git_state(tmp_path / "inner")  # does not pass for the tree around it


def test_sources_that_cannot_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, unknown = provenance.collect("0" * 64, {}, load_before=0.1)
    assert unknown == []
    assert known.fork == provenance.fork_state()

    (tmp_path / "vllm").mkdir()
    git(tmp_path, "init", "-q")  # a clone of somebody's at the place of the fork
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(release, "tree", lambda: tmp_path)
    found, unknown = provenance.collect("0" * 64, {}, load_before=0.1)
    assert (found.workspace, found.fork) == (None, None)
    assert found.binaries is None
    workspace, fork = unknown
    assert workspace.startswith("cannot tell the commit of the workspace: git rev-parse")
    assert "the fork" in fork
    assert "this workspace did not make it" in fork


def test_a_record_says_where_the_binaries_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One library of the wheel, one compiled here since; then one that was changed by hand."""
    folder = tmp_path / "vllm"
    folder.mkdir()
    crcs = {}
    for name in ("vllm/_C.abi3.so", "vllm/_moe_C.abi3.so"):
        (tmp_path / name).write_bytes(name.encode())
        crcs[name] = zlib.crc32(name.encode())
    manifest = Manifest(wheel="vllm.whl", files={**crcs, "vllm/_C.abi3.so": 1})
    manifest.own["vllm/_C.abi3.so"] = BuiltFile(crc=crcs["vllm/_C.abi3.so"], build="_C")
    manifest.builds["_C"] = Build(sources="cafe", packages={}, architectures="", time="")
    monkeypatch.setattr(built_from, "read_manifest", lambda: manifest)
    monkeypatch.setattr(built_from, "stale", lambda *_: (["csrc/a.cpp"], []))
    monkeypatch.setattr(release, "tree", lambda: tmp_path)
    made = provenance.binaries()
    assert (made.wheel, made.compiled) == ("vllm.whl", {"_C": "cafe"})
    assert made.outdated == ["csrc/a.cpp"]
    manifest.unfinished = True
    with pytest.raises(WorkspaceError, match=r"a build was interrupted; run: make fork-build"):
        provenance.binaries()
    (tmp_path / "vllm/_moe_C.abi3.so").write_bytes(b"patched")
    with pytest.raises(WorkspaceError, match=r"vllm/_moe_C\.abi3\.so was changed by hand"):
        provenance.binaries()


def test_the_hosts_packages_have_no_locked_versions_whatever_the_environment_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "MACHINE", tmp_path / "it's here")
    place = release.environment("system", release.selected())
    place.mkdir(parents=True)
    link = tmp_path / "plain"
    link.symlink_to(place.parent)
    ask = provenance.expected.__wrapped__  # the answer must not stay for other tests
    assert ask("cpu", frozenset()).versions
    for prefix in (place, link / place.name):
        monkeypatch.setattr(sys, "prefix", str(prefix))
        assert ask("cpu", frozenset()).versions == {}


def test_every_lock_is_hashed(tmp_path: Path) -> None:
    (tmp_path / "cpu.txt").write_bytes(b"torch==2.11.0\n")
    expected = hashlib.sha256(b"torch==2.11.0\n").hexdigest()
    assert provenance.lock_hashes(tmp_path) == {"cpu.txt": expected}
    assert provenance.lock_hashes(tmp_path / "none") == {}
