# SPDX-License-Identifier: Apache-2.0
"""The fork of a small release, and our own patches on the real one."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.workspace.conftest import PATCH, SOURCES, blob, sdist_bytes
from workspace.bench import operations
from workspace.environment.fetch import fetch
from workspace.fork import patch_queue, prepare, tree_state
from workspace.fork.tree_state import APPLIED
from workspace.host.errors import WorkspaceError
from workspace.host.git import git
from workspace.host.paths import KERNELS
from workspace.pins import release as releases_module
from workspace.pins.model import Release, load
from workspace.pins.release import link
from workspace.pins.release import tree as release_tree

VERSION = load().vllm.default


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    """A small release in the cache, and the fork's place moved to a temporary folder."""
    content = sdist_bytes(SOURCES)
    sha256 = hashlib.sha256(content).hexdigest()
    pinned = load().release()
    sdist = pinned.sdist.model_copy(update={"sha256": sha256})
    monkeypatch.setenv("WORKSPACE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / sha256[:16]).mkdir(parents=True)
    (tmp_path / "cache" / sha256[:16] / sdist.filename).write_bytes(content)
    place = tmp_path / "vllm-fork"
    (place / "patches" / VERSION).mkdir(parents=True)
    (place / "patches" / VERSION / "0001-add-a-line.patch").write_text(PATCH)
    small = pinned.model_copy(update={"sdist": sdist, "tree": ""})
    pins = load()
    releases = pins.vllm.model_copy(update={"release": {VERSION: small}})
    monkeypatch.setattr(prepare, "load", lambda: pins.model_copy(update={"vllm": releases}))
    monkeypatch.setattr(releases_module, "FORK", place)
    monkeypatch.setattr(patch_queue, "PATCHES", place / "patches")
    monkeypatch.setenv("WORKSPACE_RELEASE", VERSION)
    return small


def commit(tree: Path, message: str) -> None:
    command = ["git", "-c", "user.name=U", "-c", "user.email=u@example.invalid", "commit", "-qam"]
    subprocess.run([*command, message], cwd=tree, check=True)


def test_the_tree_is_the_release_with_our_patches_as_commits(release: Release) -> None:
    state = prepare.ensure()
    tree = release_tree()
    assert (tree / "vllm/envs.py").read_text() == "first = 1\nadded = True\nsecond = 2\nthird = 3\n"
    assert git("log", "--format=%s %an %ad", "--date=iso", tree=tree).splitlines() == [
        "Add a line A Maintainer 2026-11-23 09:00:00 +0000",
        f"vLLM {VERSION}, as released vLLM contributors 2000-01-01 00:00:00 +0000",
    ]
    assert state.own_work == []
    assert git("rev-parse", f"upstream/{VERSION}", tree=tree) != ""


def test_the_same_release_and_patches_are_the_same_commit(release: Release) -> None:
    first = prepare.ensure().head
    release_tree().rename(release_tree().with_name("elsewhere"))
    assert prepare.ensure().head == first


def test_what_packing_generated_is_no_part_of_the_release(release: Release) -> None:
    prepare.ensure()
    names = git("ls-files", tree=release_tree()).split()
    assert "vllm/kept.py" in names
    assert "PKG-INFO" not in names
    assert "vllm/_version.py" not in names


def test_a_second_run_changes_nothing(release: Release) -> None:
    before = prepare.ensure()
    stat = (release_tree() / "vllm/envs.py").stat()
    assert prepare.ensure() == before
    assert (release_tree() / "vllm/envs.py").stat().st_mtime_ns == stat.st_mtime_ns


def test_changed_patches_replace_the_old_ones(release: Release) -> None:
    prepare.ensure()
    patch = patch_queue.files(VERSION)[0]
    patch.write_text(PATCH.replace("added = True", "added = 'again'"))
    state = prepare.ensure()
    assert "added = 'again'" in (release_tree() / "vllm/envs.py").read_text()
    assert state.own_work == []
    assert git("rev-list", "--count", "HEAD", tree=release_tree()).strip() == "2"


def test_a_kill_after_the_new_patches_were_checked_out_is_made_good(release: Release) -> None:
    prepare.ensure()
    old = git("rev-parse", APPLIED, tree=release_tree())
    patch_queue.files(VERSION)[0].write_text(PATCH.replace("added = True", "added = 'again'"))
    made = prepare.ensure()
    git("update-ref", APPLIED, old.strip(), tree=release_tree())
    git("config", tree_state.PATCHES_KEY, "before", tree=release_tree())
    assert prepare.ensure() == made
    assert made.own_work == []


@pytest.mark.parametrize("kind", ["edit", "new file", "commit", "branch", "stash"])
def test_the_users_work_is_untouched_when_patches_change(release: Release, kind: str) -> None:
    prepare.ensure()
    tree = release_tree()
    (tree / "vllm/kept.py").write_text("mine = True\n")
    if kind == "new file":
        (tree / "vllm/kept.py").write_text(SOURCES["vllm/kept.py"])
        (tree / "vllm/new.py").write_text("mine = True\n")
    elif kind in ("commit", "branch"):
        if kind == "branch":
            git("checkout", "-q", "-b", "idea", tree=tree)
        commit(tree, "Mine")
        if kind == "branch":
            git("checkout", "-q", "main", tree=tree)
    elif kind == "stash":
        command = ["git", "-c", "user.name=U", "-c", "user.email=u@example.invalid", "stash", "-q"]
        subprocess.run(command, cwd=tree, check=True)
    before = prepare.ensure()
    assert before.own_work
    patch_queue.files(VERSION)[0].write_text(PATCH.replace("added = True", "added = 2"))
    after = prepare.ensure()
    assert (after.head, after.uncommitted, after.own_commits) == (
        before.head, before.uncommitted, before.own_commits
    )  # fmt: skip
    assert "added = True" in (tree / "vllm/envs.py").read_text()


def test_a_patch_that_does_not_apply_is_named_and_src_stays(release: Release) -> None:
    before = prepare.ensure()
    patch = patch_queue.files(VERSION)[0]
    patch.write_text(PATCH.replace(f"index {blob(SOURCES['vllm/envs.py'])}", f"index {'1' * 40}"))
    says = r"0001-add-a-line\.patch does not apply: vllm/envs\.py \(hunk -1,0 \+2,1\)"
    with pytest.raises(WorkspaceError, match=says):
        prepare.ensure()
    after = tree_state.state()
    assert after is not None
    assert (after.head, after.uncommitted) == (before.head, [])


def test_a_release_that_is_not_the_pinned_tree_is_refused(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = prepare.load()
    wrong = release.model_copy(update={"tree": "0" * 40})
    vllm = pins.vllm.model_copy(update={"release": {VERSION: wrong}})
    monkeypatch.setattr(prepare, "load", lambda: pins.model_copy(update={"vllm": vllm}))
    with pytest.raises(WorkspaceError, match="pinned is 000000000000"):
        prepare.ensure()
    assert not link().exists()
    assert list(release_tree().parent.iterdir()) == []


def test_a_tree_that_is_not_ours_is_refused_and_kept(release: Release) -> None:
    link().mkdir()
    (link() / "precious.py").write_text("mine = True\n")
    with pytest.raises(WorkspaceError, match="did not make it; move it away"):
        prepare.ensure()
    assert (link() / "precious.py").read_text() == "mine = True\n"


def test_a_tree_of_the_older_layout_moves_to_its_release_with_the_users_work(
    release: Release,
) -> None:
    prepare.ensure()
    (release_tree() / "vllm/kept.py").write_text("mine = True\n")
    commit(release_tree(), "Mine")
    (release_tree() / "vllm/new.py").write_text("mine = True\n")
    before = tree_state.state()
    link().unlink()
    release_tree().rename(link())
    assert prepare.ensure() == before
    assert os.readlink(link()) == f"releases/{VERSION}"
    link().unlink()  # where a kill came between the move and the link
    assert prepare.ensure() == before
    assert link().is_symlink()


def test_a_member_that_leaves_the_archive_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "evil.tar.gz"
    archive.write_bytes(sdist_bytes({"x.py": ""}, folder="../outside"))
    (tmp_path / "in").mkdir()
    with pytest.raises(WorkspaceError, match="cannot be unpacked"):
        prepare.unpack(archive, tmp_path / "in")
    assert not (tmp_path / "outside").exists()


def test_the_files_are_the_users_whoever_packed_them(release: Release) -> None:
    """A sdist names its packer, and root's tar would give the files to a user of that name."""
    prepare.ensure()
    owners = {path.stat().st_uid for path in release_tree().rglob("*")}
    assert owners == {os.getuid()}


# --- our own patches ------------------------------------------------------------------------

EACH_RELEASE = pytest.mark.parametrize("version", sorted(load().vllm.release))


def added(patch: Path) -> list[str]:
    lines = patch.read_text().splitlines()
    return [line for line in lines if line.startswith("+") and not line.startswith("+++")]


@EACH_RELEASE
def test_our_patches_only_add_and_hold_nothing_of_upstreams(version: str) -> None:
    assert patch_queue.files(version)
    for patch in patch_queue.files(version):
        body = patch.read_text().split("\n---\n", 1)[1].rsplit("\n-- \n", 1)[0]
        for line in body.splitlines():
            if line.startswith("@@"):
                assert line.endswith("@@"), f"holds upstream's section heading: {line}"
            else:
                assert re.match(r"diff --git |index |--- a/|\+", line), f"not ours: {line}"


@EACH_RELEASE
def test_our_patches_are_small(version: str) -> None:
    assert sum(len(added(patch)) for patch in patch_queue.files(version)) < 60


def test_each_release_has_the_same_patches() -> None:
    names = [[path.name for path in patch_queue.files(version)] for version in load().vllm.release]
    assert all(one == names[0] for one in names)


@EACH_RELEASE
def test_our_patches_or_our_plugin_register_every_switch(version: str) -> None:
    """Unregistered, a switch is no part of vLLM's torch.compile cache key."""
    text = "\n".join(line for patch in patch_queue.files(version) for line in added(patch))
    assert f'"{operations.GEMM_SWITCH}": lambda' in text
    plugin = (KERNELS / "custom_kernels/vllm/upstream.py").read_text()
    for switch in set(operations.SWITCHES) - {operations.GEMM_SWITCH}:
        assert f'    "{switch}": wanted_' in plugin


@pytest.fixture(scope="module")
def real_tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real release: of this checkout, else unpacked from its sdist, which is fetched once."""
    version = request.param
    if (release_tree(version) / "setup.py").exists():
        return release_tree(version)
    pinned = load().release(version)
    tree = prepare.unpack(fetch(pinned.sdist), tmp_path_factory.mktemp(version))
    prepare.commit_pristine(tree, version, pinned.tree)
    return tree


REAL_TREE = pytest.mark.parametrize(
    ("version", "real_tree"),
    [(version, version) for version in sorted(load().vllm.release)],
    indirect=["real_tree"],
    ids=sorted(load().vllm.release),
)


@REAL_TREE
def test_the_real_release_is_the_pinned_tree(version: str, real_tree: Path) -> None:
    tag = prepare.upstream_tag(version)
    found = git("rev-parse", f"{tag}^{{tree}}", tree=real_tree).strip()
    assert found == load().release(version).tree
    assert git("merge-base", "--is-ancestor", APPLIED, "HEAD", tree=real_tree) == ""


@REAL_TREE
def test_our_patches_apply_to_the_real_release(version: str, real_tree: Path) -> None:
    patches, tag = patch_queue.files(version), prepare.upstream_tag(version)
    tip = patch_queue.commit_files(real_tree, tag, patches)
    stat = git("diff", "--numstat", tag, tip, tree=real_tree)
    assert sum(int(line.split()[0]) for line in stat.splitlines()) == sum(
        map(len, map(added, patches))
    )
    assert all(line.split()[1] == "0" for line in stat.splitlines())
