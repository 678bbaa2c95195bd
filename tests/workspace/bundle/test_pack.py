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
from workspace.bundle.target import (
    Host,
    Package,
    problems,
    require_workable,
    supported_tags,
    unfit_torch,
)
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
        ({"gpus": [{**GPU, "driver": "570.86"}]}, "driver is 570.86, .* needs 580 .*=0.13.0"),
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


def test_an_older_driver_with_which_torch_sees_the_gpu_is_taken(here: dict[str, Any]) -> None:
    gpu = {**GPU, "driver": "550.54"}
    host = a_host(here, gpus=[gpu], torch={"version": "2.11.0", "sees_gpu": True})
    assert list(problems(host, VERSION, load())) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"torch": None}, "has no torch that can be imported"),
        ({"torch": {"version": "2.11.0+cu130"}}, "the host has torch 2.11.0+cu130"),
        ({"torch": {"version": "2.14.0a0+nv"}}, "the host has torch 2.14.0a0"),
        ({"torch": {"cuda": None}}, "built for the CPU only"),
        ({"torch": {"cuda": None}, "gpus": []}, None),
        ({"torch": {"cuda": "12.8"}}, "built for CUDA 12.8"),
        ({"packages": {"triton": {"version": "3.1.0", "requires": []}}}, "has triton 3.1.0"),
    ],
)
def test_another_torch_on_the_host_is_seen_and_does_not_prevent_a_bundle(
    here: dict[str, Any], changes: dict[str, Any], says: str | None
) -> None:
    host = a_host(here, **changes)
    reason = unfit_torch(host, RELEASE)
    assert (reason is None) is (says is None)
    assert (says or "") in (reason or "")
    require_workable(host, VERSION, load())


def test_the_release_that_needs_no_torch_in_the_bundle_is_named(here: dict[str, Any]) -> None:
    pins = load()
    version = pins.release("0.25.1").triton
    triton: dict[str, Any] = {"triton": {"version": version, "requires": []}}
    for cuda, named in (("13.0", True), ("12.8", False)):
        host = a_host(here, torch={"version": "2.11.0", "cuda": cuda}, packages=triton)
        line = pack._torch_comes_along("why", host, RELEASE, pins)
        assert ("VLLM_VERSION=0.25.1" in line) is named


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


@pytest.mark.parametrize(
    ("host", "pinned", "expected"),
    [
        ("13.1.0.3", "13.1.1.3", True),  # cuBLAS of CUDA 13.0.2 and 13.0.3
        ("13.3", "13.0.3", True),
        ("12.9", "13.0", False),
        ("9.19.0.56", "9.20.0.48", False),  # torch refuses a cuDNN older than its own
        ("9.21", "9.20.0.48", True),
        ("2.28.9", "2.29.7", False),  # NCCL: functions are missing
        ("0.8.0", "0.8.1", False),
        ("0.8.1.1", "0.8.1", True),
        ("0.9.0", "0.8.1", False),
    ],
)
def test_a_library_serves_if_it_is_of_the_major_version_and_not_of_an_older_minor_one(
    host: str, pinned: str, expected: bool
) -> None:
    assert packages.serves(host, pinned) is expected


def test_torch_comes_with_what_belongs_to_it_and_the_libraries_that_the_host_has_too_old(
    here: dict[str, Any], lock: dict[str, Entry]
) -> None:
    if "nvidia-cudnn-cu13" not in lock:
        pytest.skip("this release's libraries have other names")
    host = a_host(here)
    versions = {"torch": "2.11.0", "triton": "3.6.0", "torchvision": "0.26.0",
                "nvidia-cublas": "13.1.0.3", "nvidia-cudnn-cu13": "9.1.0.1",
                "nvidia-nccl-cu13": "2.1.0"}  # fmt: skip
    for name, version in versions.items():
        host.packages[name].version = version
    linked = Package(version="1.0", requires=["torch==2.11.0"], links_torch=True)
    host.packages |= {"flash-attn": linked, "xgrammar": linked}
    start = ["torch", "torchvision", "flash-attn", "xgrammar"]
    choice = packages.choose(start, lock, host, nvcc=True, unfit_torch="the host has torch 2.11.0")
    assert {entry.name for entry in choice.packed} >= {
        *("torch", "triton", "torchvision", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "xgrammar")
    }
    assert choice.why["torchvision"] == "the host has torch 2.11.0"
    assert "nvidia-cublas" in {kept.name for kept in choice.kept}
    assert "the lock has none" in choice.left_out["flash-attn"]


def test_a_host_without_torch_gets_all_of_its_libraries(
    here: dict[str, Any], lock: dict[str, Entry]
) -> None:
    host = a_host(here, torch=None)
    for name in [*host.packages]:
        if name in packages.TORCH or packages.LIBRARY.fullmatch(name):
            del host.packages[name]
    choice = packages.choose(["torch"], lock, host, nvcc=True, unfit_torch="no torch")
    needed = {*load().release(VERSION).cuda.libraries, "torch", "triton"}
    assert needed <= {entry.name for entry in choice.packed}


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
    host.packages.pop("quack-kernels", None)
    for capability, left_out in (("9.0", True), ("10.3", False), ("12.0", True)):
        host.gpus[0].capability = capability
        cute = packages.choose(["quack-kernels"], lock, host, nvcc=True).left_out
        assert ("quack-kernels" in cute) is left_out
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
