# SPDX-License-Identifier: Apache-2.0
"""git is run in one place, where nothing of the user's or the system's changes what it answers."""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

import pytest
from custom_kernels.bench import provenance as kernel_provenance

from tests.workspace.conftest import nasty_settings
from workspace.bench import pristine, provenance
from workspace.bundle import repository, unbundle
from workspace.host import git
from workspace.host.paths import KERNELS, ROOT

ALONE = {
    "workspace/host/git.py",
    "workspace/bundle/unbundle.py",  # travels without the rest
    "kernels/custom_kernels/bench/provenance.py",  # is installed without the rest
}


def commands(path: Path) -> list[str]:
    """The lists in a source file that begin with "git"."""
    lists = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.List)]
    return [
        ast.unparse(node)
        for node in lists
        if node.elts and isinstance(node.elts[0], ast.Constant) and node.elts[0].value == "git"
    ]


def test_one_place_runs_git() -> None:
    sources = [*(ROOT / "workspace").rglob("*.py"), *(KERNELS / "custom_kernels").rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in sources if commands(path)}
    assert found == ALONE


def test_a_bundle_runs_git_in_the_same_environment(tmp_path: Path) -> None:
    assert unbundle.NO_HOME == git.NO_HOME


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with one commit, and the user's settings and a hook around us."""
    source = tmp_path / "source"
    (source / "vllm").mkdir(parents=True)
    (source / ".gitignore").write_text("*.so\n")
    (source / "vllm" / "__init__.py").write_bytes(b"one = 1\r\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"], ["tag", "upstream/1.0"]):
        identity = ["-c", "user.name=U", "-c", "user.email=u@example.invalid"]
        subprocess.run(["git", *identity, *words], cwd=source, check=True)
    (source / "vllm" / "_C.so").write_bytes(b"binary")
    for name, value in nasty_settings(tmp_path).items():
        monkeypatch.setenv(name, value)
    return source


def test_a_record_names_the_trees_own_commit_and_every_file_that_is_not_in_it(tree: Path) -> None:
    commit = (tree / ".git/refs/tags/upstream/1.0").read_text().strip()
    assert provenance.git_state(tree) == provenance.GitState(commit=commit, dirty=False)
    (tree / "vllm" / "mine.cu").write_text("ignored by the user's own settings only\n")
    assert provenance.git_state(tree) == provenance.GitState(commit=commit, dirty=True)


def test_a_kernel_record_names_this_checkouts_commit(tree: Path) -> None:
    commit = kernel_provenance._git("rev-parse", "HEAD")
    assert commit == git.git("rev-parse", "HEAD", tree=ROOT).strip()
    assert commit != git.git("rev-parse", "HEAD", tree=Path(os.environ["GIT_WORK_TREE"])).strip()


def test_the_pristine_release_is_unpacked_as_it_was(tree: Path, tmp_path: Path) -> None:
    (tree / "vllm" / "mine.py").write_text("ignored by the user's own settings only\n")
    made = pristine.make_tree(tree, tmp_path / "pristine", "upstream/1.0", pinned="")
    assert (made / "vllm" / "__init__.py").read_bytes() == b"one = 1\r\n"
    assert sorted(path.name for path in (made / "vllm").iterdir()) == ["_C.so", "__init__.py"]


def test_a_tree_whose_index_is_split_can_be_packed(tree: Path, tmp_path: Path) -> None:
    git.git("update-index", "--split-index", tree=tree)
    (tree / "vllm" / "mine.py").write_text("x = 1\n")
    made = repository.snapshot(tree, tmp_path / "bare")
    names = git.git("ls-tree", "-r", "--name-only", made, tree=tmp_path / "bare").split()
    assert names == [".gitignore", "vllm/__init__.py", "vllm/mine.py"]


def test_the_users_own_git_in_a_tree_stays_theirs(tree: Path) -> None:
    assert git.git("config", "--get", "core.abbrev", tree=tree, check=False) == ""
    assert git.as_user("config", "--get", "user.name", tree=tree) == "Jo Doe\n"
    assert git.committer(tree)["GIT_COMMITTER_EMAIL"] == "jo@example.invalid"
