# SPDX-License-Identifier: Apache-2.0
"""Packing: what a host lacks, trees that travel, one stream in parts."""

from __future__ import annotations

import json
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from custom_kernels import paths
from custom_kernels.compile import toolchain
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workspace.conftest import edit_in_the_same_second
from workspace.bundle import archive, pack, packages, place, repository, unbundle
from workspace.bundle.target import Host, problems, require_workable, supported_tags
from workspace.environment import inventory
from workspace.environment.lock import Entry, locked
from workspace.fork.tree_state import uncommitted
from workspace.host.errors import WorkspaceError
from workspace.host.paths import lock_path
from workspace.pins.model import load

VERSION = load().vllm.default
RELEASE = load().release(VERSION)
GPU = {"name": "a GPU", "driver": "580", "capability": "9.0"}


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    return inventory.collect()


def a_host(here: dict[str, Any], **changes: Any) -> Host:
    """This machine, as a host with a GPU and all that vLLM needs, but for `changes`."""
    torch = {"version": f"{RELEASE.torch}+cu130", "cuda": RELEASE.cuda.release}
    base: dict[str, Any] = {
        **here,
        "gpus": [GPU],
        "torch": torch,
        "libnuma": True,
        "python": {**here["python"], "headers": True, "missing_modules": []},
        "nvcc": {"path": "/usr/bin/nvcc", "version": f"{RELEASE.cuda.release}.1"},
        "tools": {"git": "git", "make": "make", "g++": "g++"},
    }
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) else value
    return Host.model_validate(base)


# --- parts ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    content=st.binary(max_size=20_000),
    limit=st.integers(archive.SMALLEST_PART, 5000),
    cuts=st.lists(st.integers(1, 4000), max_size=20),
)
def test_parts_joined_are_the_stream_that_was_cut(
    content: bytes, limit: int, cuts: list[int]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sink = archive.Parts(folder, "0" * 16, len(content), limit)
        rest = content
        for cut in [*cuts, len(content)]:
            sink.write(rest[:cut])
            rest = rest[cut:]
        manifest = {"identity": "0" * 16, "parts": sink.finish()}
        sizes = [(folder / str(part["name"])).stat().st_size for part in manifest["parts"]]
        assert max(sizes) <= limit
        unbundle.check_parts(folder, manifest)
        stream = unbundle.Joined(folder, manifest)
        assert b"".join(iter(lambda: stream.read(1000), b"")) == content


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text("abcé/_.-", min_size=1, max_size=180).filter(lambda name: name.strip("/.") != ""),
        st.integers(0, 30_000),
        max_size=8,
    )
)
def test_the_size_announced_is_the_size_of_the_archive(files: dict[str, int]) -> None:
    entries = []
    for name, size in files.items():
        entry = tarfile.TarInfo(name)
        entry.size = size
        entries.append(entry)
    with tempfile.TemporaryFile() as sink:
        with tarfile.open(fileobj=sink, mode="w|", format=archive.TAR) as packed_files:
            for entry in entries:
                with Path("/dev/zero").open("rb") as zeros:
                    packed_files.addfile(entry, zeros)
        assert sink.tell() == archive.archive_size(entries)


@pytest.mark.parametrize(
    ("text", "size"),
    [("60M", 60_000_000), ("2g", 2_000_000_000), ("1.5MB", 1_500_000), ("4096", 4096)],
)
def test_a_size_of_parts_is_read(text: str, size: int) -> None:
    assert archive.part_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "big", "-5M", "10"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(WorkspaceError, match="PARTS=60M"):
        archive.part_size(text)


# --- the host -------------------------------------------------------------------------------------


def test_a_host_with_the_pinned_torch_is_workable(here: dict[str, Any]) -> None:
    assert list(problems(a_host(here, packages={}), VERSION, load())) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"python": {"short": "3.9", "executable": "/usr/bin/python3"}},
            "is Python 3.9, supported",
        ),
        ({"python": {"short": "3.14"}}, "is Python 3.14, supported are 3.11, 3.12, 3.13"),
        ({"python": {"free_threaded": True}}, "free-threaded"),
        ({"python": {"missing_modules": ["venv"]}}, "lacks Python's own venv"),
        ({"python": {"headers": False}}, "has no Python.h"),
        ({"machine": "riscv64"}, "it is riscv64"),
        ({"libc": {"name": ""}}, "C library"),
        ({"torch": None}, "has no torch that can be imported"),
        ({"torch": {"version": "2.4.1"}}, f"torch 2.4.1, the binaries of vLLM .* {RELEASE.torch}"),
        ({"torch": {"version": "2.11.0"}}, r"the release that .* \(VLLM_VERSION=0\.25\.1\), or"),
        ({"torch": {"cuda": None}}, "built for the CPU only"),
        ({"torch": {"cuda": "12.8"}}, "built for CUDA 12.8"),
        ({"packages": {"triton": {"version": "3.1.0", "requires": []}}}, "triton 3.1.0"),
        ({"tools": {"git": None}}, "it lacks git"),
        ({"gpus": [], "libnuma": False}, "libnuma"),
    ],
)
def test_a_host_that_cannot_work_is_refused_in_one_line(
    here: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(WorkspaceError, match=says) as caught:
        require_workable(a_host(here, **changes), VERSION, load())
    assert str(caught.value).startswith("no bundle for that host: ")
    assert "\n" not in str(caught.value)


def test_wheels_for_the_hosts_glibc_or_older_fit_and_no_newer(here: dict[str, Any]) -> None:
    host = a_host(here, libc={"version": "2.28"}, python={"short": "3.12"})
    found = {str(tag) for tag in supported_tags(host)}
    machine = host.machine
    assert f"cp312-cp312-manylinux_2_28_{machine}" in found
    assert f"cp38-abi3-manylinux2014_{machine}" in found
    assert "py3-none-any" in found
    assert f"cp312-cp312-manylinux_2_31_{machine}" not in found
    assert f"cp313-cp313-manylinux_2_28_{machine}" not in found


# --- packages -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lock(here: dict[str, Any]) -> dict[str, Entry]:
    return locked([lock_path(VERSION)], here["markers"])


def test_the_lock_is_read_with_its_hashes(lock: dict[str, Entry]) -> None:
    assert lock["torch"].version.split("+")[0] == RELEASE.torch
    assert all(len(sha256) == 64 for entry in lock.values() for sha256 in entry.sha256)
    assert all(entry.sha256 for entry in lock.values())


def test_a_host_that_has_everything_gets_nothing(
    here: dict[str, Any], lock: dict[str, Entry]
) -> None:
    choice = packages.choose(["typer", "requests>=2"], lock, a_host(here), nvcc=True)
    assert choice.packed == []
    assert {"typer", "rich", "requests"} <= {kept.name for kept in choice.kept}


def test_what_the_host_lacks_comes_with_all_that_it_needs(
    here: dict[str, Any], lock: dict[str, Entry]
) -> None:
    lacking = {"typer", "rich", "markdown-it-py", "mdurl"}
    there = {n: p for n, p in here["packages"].items() if n not in lacking}
    host = a_host(here).model_copy(update={"packages": a_host(here).packages})
    for name in lacking:
        del host.packages[name]
    choice = packages.choose(["typer"], lock, host, nvcc=True)
    assert {entry.name for entry in choice.packed} == lacking
    assert {kept.name for kept in choice.kept} <= there.keys()


def test_a_version_that_somebody_refuses_is_replaced_and_then_those_that_refuse_the_new_one(
    here: dict[str, Any], lock: dict[str, Entry]
) -> None:
    host = a_host(here)
    host.packages["requests"].version = "1.0"
    # On the host by chance, and it does not take the pinned requests.
    host.packages["datasets"].requires = ["requests<2"]
    choice = packages.choose(["requests>=2", "datasets"], lock, host, nvcc=True)
    assert {"requests", "datasets"} <= {entry.name for entry in choice.packed}
    assert "requires >=2, the host has 1.0" in choice.why["requests"]
    assert "datasets" not in {kept.name for kept in choice.kept}


def test_torch_and_its_cuda_libraries_stay_the_hosts_whatever_their_versions(
    here: dict[str, Any], lock: dict[str, Entry]
) -> None:
    host = a_host(here)
    host.packages["nvidia-cublas"].version = "1.0"
    choice = packages.choose(["torch==9.9", "nvidia-cublas"], lock, host, nvcc=True)
    kept = {one.name: one for one in choice.kept}
    assert kept["nvidia-cublas"].host == "1.0"
    assert kept["nvidia-cublas"].differs
    assert "torch" in kept
    assert choice.packed == []


def test_without_nvcc_the_tool_chain_comes_along_whole(
    here: dict[str, Any], lock: dict[str, Entry]
) -> None:
    if not RELEASE.cuda.packages_hold_nvcc:
        pytest.skip("the packages of this release hold no nvcc")
    host = a_host(here).model_copy(update={"nvcc": None})
    start = packages.roots(load(), VERSION, host)
    choice = packages.choose(start, lock, host, nvcc=host.has_nvcc(RELEASE))
    assert set(packages.TOOL_CHAIN) <= {entry.name for entry in choice.packed}


def test_what_is_left_out_is_named_with_the_reason_and_so_is_what_the_lock_lacks(
    here: dict[str, Any], lock: dict[str, Entry]
) -> None:
    host = a_host(here)
    host.packages.pop("flashinfer-python", None)
    choice = packages.choose(["flashinfer-python", "no-such-package"], lock, host, nvcc=True)
    assert "VLLM_USE_FLASHINFER_SAMPLER" in choice.left_out["flashinfer-python"]
    assert "not in the lock" in choice.left_out["no-such-package"]
    assert choice.packed == []


def test_a_recompressed_wheel_has_the_files_of_the_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as original:
        original.writestr("lib.so", b"machine code " * 9999)
        entry = zipfile.ZipInfo("bin/run")
        entry.external_attr = 0o755 << 16
        original.writestr(entry, b"#!/bin/sh\n")
    copy = archive.recompressed(wheel)
    with zipfile.ZipFile(copy) as smaller:
        assert smaller.read("lib.so") == b"machine code " * 9999
        assert smaller.getinfo("bin/run").external_attr >> 16 == 0o755
    assert copy.stat().st_size < wheel.stat().st_size
    before = copy.stat().st_mtime_ns
    assert archive.recompressed(wheel) == copy
    assert copy.stat().st_mtime_ns == before


# --- trees ----------------------------------------------------------------------------------------


def git(tree: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=U", "-c", "user.email=u@example.invalid"]
    result = subprocess.run(
        ["git", *identity, *arguments], cwd=tree, capture_output=True, text=True, check=True
    )
    return result.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with two branches, a tag, a stash, and every kind of edit."""
    tree = tmp_path / "tree"
    tree.mkdir()
    git(tree, "init", "-q", "-b", "main")
    for name in ("kept", "changed", "gone", "moved", "ignored-later"):
        (tree / name).write_text(f"{name}\n")
    (tree / ".gitignore").write_text("*.so\n")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "first")
    git(tree, "tag", "v1")
    git(tree, "branch", "other")
    for text in ("stashed\n", "stashed, too\n"):
        (tree / "changed").write_text(text)
        git(tree, "stash")
    (tree / "kept").write_text("second\n")
    git(tree, "commit", "-qam", "second")
    (tree / "changed").write_bytes(b"edited\r\n\0")
    (tree / "gone").unlink()
    (tree / "new").write_text("untracked\n")
    (tree / "new").chmod(0o755)
    (tree / "link").symlink_to("kept")
    (tree / "left.so").write_text("ignored")
    git(tree, "add", "new")
    git(tree, "remote", "add", "origin", "https://user:secret@example.invalid/x.git")
    return tree


def packed(tree: Path, tmp_path: Path) -> Path:
    """The tree, packed and restored."""
    repository.pack(tree, tmp_path / "t.git", everything=True)
    subprocess.run(["find", tmp_path / "t.git", "-type", "d", "-empty", "-delete"], check=True)
    (tmp_path / "t.git" / "refs").mkdir(exist_ok=True)
    unbundle.restore(tmp_path / "t.git", tmp_path / "restored")
    return tmp_path / "restored"


def test_a_tree_that_travelled_has_the_same_commits_branches_stash_and_edits(
    tree: Path, tmp_path: Path
) -> None:
    before = git(tree, "status", "--porcelain")
    restored = packed(tree, tmp_path)
    assert git(tree, "status", "--porcelain") == before
    for question in (
        ("log", "--all", "--format=%H %s"),
        ("for-each-ref", "refs/heads", "refs/tags", "refs/stash"),
        ("stash", "list", "--format=%H"),
        ("symbolic-ref", "HEAD"),
        ("rev-parse", "HEAD"),
        ("diff", "--binary", "HEAD", "--", "changed", "gone"),
    ):
        assert git(restored, *question) == git(tree, *question), question
    assert uncommitted(restored) == [" M changed", " D gone", "?? link", "?? new"]
    assert (restored / "new").stat().st_mode & 0o111
    assert (restored / "link").readlink() == Path("kept")
    assert not (restored / "left.so").exists()
    git(restored, "fsck", "--strict")


def test_no_address_no_credential_and_no_setting_travels(tree: Path, tmp_path: Path) -> None:
    repository.pack(tree, tmp_path / "t.git", everything=True)
    for path in (tmp_path / "t.git").rglob("*"):
        if path.is_file():
            assert b"secret" not in path.read_bytes(), path
    assert git(tmp_path / "t.git", "remote") == ""


def test_without_everything_only_the_branch_at_hand_travels(tree: Path, tmp_path: Path) -> None:
    repository.pack(tree, tmp_path / "t.git", everything=False)
    refs = git(tmp_path / "t.git", "for-each-ref", "--format=%(refname)").split()
    assert refs == [unbundle.WORKTREE, "refs/heads/main"]


def test_a_shallow_clone_and_a_detached_head_travel(tree: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{tree}", "shallow")
    shallow = tmp_path / "shallow"
    git(shallow, "checkout", "-q", "--detach")
    (shallow / "kept").write_text("edited\n")
    restored = packed(shallow, tmp_path)
    assert git(restored, "log", "--format=%s").split() == ["second"]
    assert uncommitted(restored) == [" M kept"]


def test_an_edit_travels_that_was_made_in_the_second_of_the_commit(
    tree: Path, tmp_path: Path
) -> None:
    edit_in_the_same_second(tree / "kept")
    restored = packed(tree, tmp_path)
    assert (restored / "kept").read_text() == "SECOND\n"


def test_a_repository_inside_the_tree_is_refused(tree: Path, tmp_path: Path) -> None:
    (tree / "inner").mkdir()
    git(tree / "inner", "init", "-q")
    git(tree / "inner", "commit", "-q", "--allow-empty", "-m", "x")
    with pytest.raises(WorkspaceError, match="inner is a git repository inside"):
        repository.pack(tree, tmp_path / "t.git", everything=True)


def test_a_manifest_that_was_changed_is_not_believed(tmp_path: Path) -> None:
    manifest: dict[str, Any] = {"format": unbundle.FORMAT, "name": "a", "parts": []}
    manifest["identity"] = unbundle.identity_of(manifest)
    (tmp_path / unbundle.MANIFEST).write_text(json.dumps(manifest))
    assert unbundle.read_manifest(tmp_path) == manifest
    (tmp_path / unbundle.MANIFEST).write_text(json.dumps({**manifest, "name": "b"}))
    with pytest.raises(unbundle.UnbundleError, match=r"manifest\.json is damaged"):
        unbundle.read_manifest(tmp_path)


def test_headers_that_travelled_are_found_as_those_of_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "include" / "cutlass").mkdir(parents=True)
    (tmp_path / "include" / "cutlass" / "a.h").write_text("// a\n")
    headers = tmp_path / "cutlass.zip"
    archive.zip_headers(headers, "cutlass", tmp_path / "include", "flashinfer-python 1.2")
    state = tmp_path / ".workspace"
    state.mkdir()
    monkeypatch.setattr(place, "STATE", state)
    monkeypatch.setattr(place, "HEADERS", state / "headers")
    place._place_headers(headers)
    place._place_headers(headers)  # once more, over what is there
    monkeypatch.setattr(paths, "checkout", lambda: tmp_path)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    folder, package = toolchain.headers("cutlass")
    assert (folder / "cutlass" / "a.h").read_text() == "// a\n"
    assert package == "flashinfer-python 1.2"
    assert [path.name for path in state.iterdir()] == ["headers"]


def test_an_edit_that_holds_a_token_is_refused_and_an_ignored_one_is_not(
    tree: Path,
) -> None:
    pack.refuse_credentials(tree)
    value = "hf_" + "aB3" * 12
    (tree / ".env").write_text(f"HF_TOKEN={value}\n")
    with pytest.raises(WorkspaceError, match=r"no bundle was made.*\.env") as refused:
        pack.refuse_credentials(tree)
    assert value not in str(refused.value)
    (tree / ".git" / "info" / "exclude").write_text(".env\n")
    pack.refuse_credentials(tree)
