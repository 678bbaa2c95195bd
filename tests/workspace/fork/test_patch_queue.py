# SPDX-License-Identifier: Apache-2.0
"""A commit written as a patch and applied again is the same commit: tree, author, date, message."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.workspace.conftest import blob, nasty_settings
from workspace.fork import patch_queue
from workspace.fork.patch_queue import Patch, identity
from workspace.host.errors import WorkspaceError
from workspace.host.git import git

AUTHOR = ("Ada Q. Öhm, Jr.", "ada@example.invalid", "Mon, 23 Nov 2026 09:00:00 +0530")
LINES = "".join(f"line {n % 7}\n" for n in range(60))
BASE: dict[str, bytes] = {
    "vllm/envs.py": LINES.encode(),
    "vllm/a name with  spaces.py": b"x = 1\ny = 2\n",
    'vllm/quo"ted\\and\ttabbed.py': b"z = 3\n",
    "vllm/über/naïve.py": "größe = 1\n".encode(),
    "csrc/binary.bin": bytes(range(256)) * 8,
    "csrc/no_newline.cu": b"int a;\nint b;",
    "csrc/crlf.cuh": b"one\r\ntwo\r\nthree\r\n",
    "tools/run.sh": b"#!/bin/sh\nexit 0\n",
    "empty": b"",
    "-dashed": b"- not removed\n+ not added\n@@ -1 +1 @@ not a hunk\n",
    "b/a/b": b"--- a/x\n+++ b/x\ndiff --git a/x b/x\n",
}


def repository(folder: Path) -> Path:
    """A repository whose one commit holds BASE."""
    for name, content in BASE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    git("init", "-q", "--template=", "--initial-branch=main", ".", tree=folder)
    commit(folder, b"base\n")
    git("tag", "upstream/1", tree=folder)
    return folder


def commit(tree: Path, message: bytes, author: tuple[str, str, str] = AUTHOR) -> None:
    git("add", "--all", ".", tree=tree)
    written = git("write-tree", tree=tree).strip()
    parents = git("rev-parse", "-q", "--verify", "HEAD", tree=tree, check=False).split()
    arguments = [word for parent in parents for word in ("-p", parent)]
    env = identity(*author)
    made = git("commit-tree", written, *arguments, tree=tree, env=env, stdin=message).strip()
    git("update-ref", "HEAD", made, tree=tree)


def described(tree: Path, tip: str) -> list[str]:
    form = "--format=%T%x00%an%x00%ae%x00%ad%x00%B%x01"
    listed = git("log", "--date=raw", "--encoding=UTF-8", form, f"upstream/1..{tip}", tree=tree)
    # Blank lines before and after a message are no part of it.
    entries = [entry.strip("\n").split("\0") for entry in listed.split("\x01")]
    return ["\0".join(field.strip("\n") for field in entry) for entry in entries]


def round_trip(tree: Path) -> list[bytes]:
    """Write HEAD's commits as files, apply those to the base, compare; the files."""
    found = patch_queue.commits(tree, "upstream/1", "HEAD")
    contents = [patch_queue.as_file(patch_queue.read_commit(tree, one)) for one in found]
    patches = [(str(n), patch_queue.from_file(content)) for n, content in enumerate(contents)]
    tip = patch_queue.commit_all(tree, "upstream/1", patches)
    assert described(tree, tip) == described(tree, "HEAD")
    again = [
        patch_queue.as_file(patch_queue.read_commit(tree, one))
        for one in patch_queue.commits(tree, "upstream/1", tip)
    ]
    assert again == contents
    return contents


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return repository(tmp_path)


# --- random commits -------------------------------------------------------------------------

odd_names = st.sampled_from(
    ["new.py", "with space", "tab\there", 'quote"d', "back\\slash", "ünï", "-x", "a/b/new", "[*]?",
     "trailing ", "new\nline", "emoji😀.cu", "vllm/a", " leading"]
)  # fmt: skip
contents = st.one_of(
    st.binary(max_size=40),
    st.lists(
        st.sampled_from(
            [b"", b"line 1", b"line 2", b"-- ", b"---", b"@@ -1 +1 @@", b"\\ No", b"\r"]
        ),
        max_size=12,
    ).map(b"\n".join),
    st.just(LINES.encode()),
)
edits = st.lists(
    st.tuples(
        st.integers(0, 70), st.integers(0, 3), st.lists(st.sampled_from(["line 1", "new", ""]))
    ),
    min_size=1,
    max_size=4,
)
operations = st.one_of(
    st.tuples(st.just("write"), odd_names | st.sampled_from(sorted(BASE)), contents),
    st.tuples(st.just("edit"), st.just("vllm/envs.py"), edits),
    st.tuples(st.just("delete"), st.sampled_from(sorted(BASE)), st.none()),
    st.tuples(st.just("rename"), st.sampled_from(sorted(BASE)), odd_names),
    st.tuples(st.just("mode"), st.sampled_from(sorted(BASE)), st.none()),
    st.tuples(st.just("link"), odd_names, st.sampled_from(["vllm", "nowhere"])),
)
texts = st.text(
    st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",)), max_size=60
)
message_lines = st.one_of(
    st.sampled_from(
        ["---", "> ---", ">---", "diff --git a/x b/x", "From me", ">From me", "-- ", "",
         "[PATCH] x", "Subject: y", " indented", "# comment", "@@ -1 +1 @@", "+++ b/x"]
    ),
    texts,
)  # fmt: skip
messages = st.lists(message_lines, max_size=6).map("\n".join)


def carry_out(tree: Path, operation: tuple[str, str, Any]) -> None:
    kind, name, value = operation
    place = tree / name
    if kind in ("write", "link"):
        for parent in place.parents:
            if parent != tree and parent.is_file():
                return
        if place.is_dir() and not place.is_symlink():
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.write_bytes(value) if kind == "write" else place.symlink_to(value)
    elif not place.is_file() or place.is_symlink():
        return
    elif kind == "edit":
        lines = place.read_bytes().split(b"\n")
        for start, removed, added in value:
            lines[start : start + removed] = [line.encode() for line in added]
        place.write_bytes(b"\n".join(lines))
    elif kind == "delete":
        place.unlink()
    elif kind == "rename":
        target = tree / value
        if not target.exists() and not any(p.is_file() for p in target.parents):
            target.parent.mkdir(parents=True, exist_ok=True)
            place.rename(target)
    elif kind == "mode":
        place.chmod(0o755 if not os.access(place, os.X_OK) else 0o644)


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield repository(Path(folder))


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
)
@given(st.lists(st.tuples(st.lists(operations, max_size=5), messages), min_size=1, max_size=3))
def test_any_commits_come_back_as_they_were(
    template: Path, made: list[tuple[list[tuple[str, str, Any]], str]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(shutil.copytree(template, Path(folder) / "tree", symlinks=True))
        for changes, message in made:
            for change in changes:
                carry_out(tree, change)
            commit(tree, message.encode())
        round_trip(tree)


# --- named cases ----------------------------------------------------------------------------


def test_a_patch_holds_no_context_and_no_section_headings(tree: Path) -> None:
    text = "def function():\n" + LINES
    (tree / "vllm/envs.py").write_text(text)
    commit(tree, b"Give it a heading\n")
    git("tag", "-f", "upstream/1", tree=tree)
    (tree / "vllm/envs.py").write_text(
        text.replace("line 3\nline 4\n", "line 3\nmine\nline 4\n", 1)
    )
    commit(tree, b"Insert a line\n")
    (content,) = round_trip(tree)
    assert b"function" not in content
    assert b"line " not in content
    assert content.count(b"@@") == 2


def test_a_renamed_file_is_not_written_out(tree: Path) -> None:
    (tree / "vllm/envs.py").rename(tree / "vllm/moved.py")
    commit(tree, b"Move\n")
    (content,) = round_trip(tree)
    assert b"rename from vllm/envs.py" in content
    assert b"line 1" not in content


def test_lines_of_a_message_that_look_like_a_patch_come_back(tree: Path) -> None:
    message = (
        b"Subject\nof two lines\n\n---\n>--- x\nFrom here\ndiff --git a/x b/x\n>diff - y\n\nend\n"
    )
    (tree / "empty").write_text("no more\n")
    commit(tree, message)
    (content,) = round_trip(tree)
    assert patch_queue.from_file(content).message == message


def test_the_lines_of_a_patch_are_counted_by_its_hunks(tree: Path) -> None:
    (tree / "-dashed").write_bytes(b"--- a/x\n+++ b/x\n")
    (tree / "new").write_bytes(b"-- \n@@ -1,5 +1,5 @@\n")
    (tree / "csrc/binary.bin").write_bytes(b"\0\1\2")
    commit(tree, b"Change\n")
    assert patch_queue.read_commit(tree, "HEAD").lines == (4, 3)


def test_what_git_format_patch_writes_is_read_too(tree: Path) -> None:
    (tree / "vllm/envs.py").write_text("first\n" + LINES)
    (tree / "csrc/binary.bin").write_bytes(b"\0\1\2")
    commit(tree, b"A subject\n\nAnd a body.\n")
    git("format-patch", "-q", "-U0", "--full-index", "--binary", "upstream/1", tree=tree)
    (path,) = tree.glob("0001-*.patch")
    tip = patch_queue.commit_files(tree, "upstream/1", [path])
    assert git("rev-parse", f"{tip}^{{tree}}", tree=tree) == git(
        "rev-parse", "HEAD^{tree}", tree=tree
    )
    assert described(tree, tip)[0].split("\0")[4] == "A subject\n\nAnd a body."


def test_git_applies_what_we_write(tree: Path) -> None:
    (tree / "vllm/envs.py").write_text(LINES.replace("line 5", "line five"))
    (tree / "vllm/über/naïve.py").rename(tree / "plain")
    commit(tree, b"Change\n")
    after = git("rev-parse", "HEAD^{tree}", tree=tree)
    (content,) = round_trip(tree)
    git("reset", "-q", "--hard", "upstream/1", tree=tree)
    git("apply", "--index", "--unidiff-zero", tree=tree, stdin=content)
    assert git("write-tree", tree=tree) == after


def test_the_users_settings_change_nothing(
    tree: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those of the user, the system or a hook around us, nor those in the tree's own
    configuration."""
    (tree / "csrc/crlf.cuh").write_bytes(b"one\r\nnew \r\n\tthree  \n")
    (tree / "vllm/über/naïve.py").write_text("größe = 2   \n")
    (tree / "empty").rename(tree / "vllm/none")
    commit(tree, "Größer\n".encode())
    before = round_trip(tree)
    folder = tmp_path_factory.mktemp("nasty")
    for name, value in nasty_settings(folder).items():
        monkeypatch.setenv(name, value)
    assert round_trip(tree) == before
    (tree / "new.bat").write_bytes(b"rem\r\n")
    git("add", "--all", ".", tree=tree)
    assert git("ls-files", "-s", "new.bat", tree=tree).split()[1] == blob("rem\r\n")
    git("config", "include.path", str(folder / "home/nasty"), tree=tree)
    assert round_trip(tree) == before


def test_a_merge_is_refused_with_the_remedy(tree: Path) -> None:
    git("checkout", "-q", "-b", "side", tree=tree)
    (tree / "side").write_text("x\n")
    commit(tree, b"Side\n")
    git("checkout", "-q", "main", tree=tree)
    (tree / "main").write_text("x\n")
    commit(tree, b"Main\n")
    person = identity(*AUTHOR)
    git("merge", "-q", "--no-edit", "side", tree=tree, env=person)
    with pytest.raises(WorkspaceError, match=r"is a merge.*git rebase upstream/1"):
        patch_queue.commits(tree, "upstream/1", "HEAD")


def test_a_history_that_is_not_based_on_the_release_is_refused(tree: Path) -> None:
    git("checkout", "-q", "--orphan", "other", tree=tree)
    commit(tree, b"Alone\n")
    with pytest.raises(WorkspaceError, match="is not based on upstream/1"):
        patch_queue.commits(tree, "upstream/1", "HEAD")


def test_a_patch_for_another_file_names_file_and_hunk(tree: Path) -> None:
    (tree / "vllm/envs.py").write_text(LINES + "last\n")
    (tree / "empty").write_text("full\n")
    commit(tree, b"Change\n")
    patch = patch_queue.read_commit(tree, "HEAD")
    git("reset", "-q", "--hard", "upstream/1", tree=tree)
    (tree / "vllm/envs.py").write_text("other\n" + LINES)
    commit(tree, b"Something else\n")
    with pytest.raises(WorkspaceError) as error:
        patch_queue.commit_all(tree, "HEAD", [("0007-x.patch", patch)])
    assert "0007-x.patch does not apply: vllm/envs.py (hunk -60,0 +61)" in str(error.value)
    assert git("status", "--porcelain", tree=tree) == ""


def test_a_patch_without_full_hashes_is_refused(tree: Path) -> None:
    """Nothing else would notice that its lines land in the wrong place."""
    diff = b"diff --git a/empty b/empty\n--- a/empty\n+++ b/empty\n@@ -0,0 +1 @@\n+x\n"
    patch = Patch(*AUTHOR, b"No index\n", diff)
    with pytest.raises(WorkspaceError, match=r"empty \(hunk -0,0 \+1\) has no full index line"):
        patch_queue.commit_all(tree, "upstream/1", [("p", patch)])


def test_a_file_that_is_no_patch_is_named(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "0001-x.patch"
    path.write_text("hello\n")
    with pytest.raises(WorkspaceError, match=r"0001-x\.patch is not a patch"):
        patch_queue.commit_files(tree, "upstream/1", [path])
