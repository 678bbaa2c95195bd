# SPDX-License-Identifier: Apache-2.0
"""fork-status, fork-diff, fork-export, fork-rebase and the switch, whole, on small releases.

Every test begins from the same fork: two releases that pins.toml has, the default one unpacked.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.workspace.conftest import (
    CHANGED,
    KILLS,
    NEW,
    OLD,
    Checkout,
    blob,
    nasty_settings,
)

PATCH_LINE = "added = True\n"


@pytest.fixture
def fork(ready_checkout: Checkout) -> Checkout:
    return ready_checkout


def commit(fork: Checkout, name: str, text: str, message: str) -> str:
    (fork.src / name).parent.mkdir(parents=True, exist_ok=True)
    (fork.src / name).write_text(text)
    fork.git("add", "--all")
    fork.git("commit", "-q", "-m", message)
    return fork.git("rev-parse", "HEAD")


def status(fork: Checkout) -> dict[str, Any]:
    result = fork.make("fork-status", "JSON=1")
    assert result.returncode == 0, result.stdout
    return json.loads(result.stdout)


def succeed(fork: Checkout, *arguments: str, **env: str) -> str:
    result = fork.make(*arguments, **env)
    assert result.returncode == 0, result.stdout
    return result.stdout


def fail(fork: Checkout, *arguments: str) -> str:
    """The one error line of a command that fails."""
    result = fork.make(*arguments)
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stdout
    (error,) = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    return error


def reachable(tree: Path) -> set[str]:
    """Every commit that a branch, a tag, a stash, HEAD or a ref of ours leads to."""
    found: set[str] = set()
    if (tree / ".git").exists():
        command = ["git", "rev-list", "--all", "HEAD"]
        result = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True)
        found = set(result.stdout.split())
    return found


def envs(fork: Checkout) -> str:
    return (fork.src / "vllm/envs.py").read_text()


# --- status and diff ------------------------------------------------------------------------


def test_status_says_what_is_exported_and_what_is_not(fork: Checkout) -> None:
    found = status(fork)
    assert (found["release"], found["branch"], found["own_commits"]) == (OLD, "main", [])
    assert found["patches"] == [
        {"name": "0001-add-a-line.patch", "added": 1, "removed": 0, "binary": False}
    ]
    commit(fork, "vllm/kept.py", "mine = True\n", "My idea")
    (fork.src / "vllm/fresh.py").write_text("x\n")
    found = status(fork)
    assert [line.split(" ", 1)[1] for line in found["own_commits"]] == ["My idea"]
    assert found["uncommitted"] == ["?? vllm/fresh.py"]
    shown = succeed(fork, "fork-status")
    for words in ("My idea", "?? vllm/fresh.py", "make fork-export", f"vLLM {OLD}"):
        assert words in shown


def test_status_says_which_patches_remove_upstream_lines(fork: Checkout) -> None:
    commit(fork, "vllm/kept.py", "mine = True\n", "Replace a line")
    assert "0002-replace-a-line.patch removes 1 upstream line" in succeed(fork, "fork-export")
    assert status(fork)["patches"][1]["removed"] == 1
    assert "removes 1 upstream line" in succeed(fork, "fork-status")


def test_status_needs_no_environment(fork: Checkout) -> None:
    away = (fork.root / ".venv").rename(fork.root / ".venv-away")
    try:
        assert f"vLLM {OLD}" in succeed(fork, "fork-status")
        assert not (fork.root / ".venv").exists()
    finally:
        away.rename(fork.root / ".venv")


def test_diff_shows_commits_edits_and_new_files_and_can_be_applied(
    fork: Checkout, tmp_path: Path
) -> None:
    """Whatever the user's own git is set up to show."""
    commit(fork, "vllm/mine.py", "mine = 1\n", "Mine")
    (fork.src / "vllm/kept.py").write_text("edited = True\n")
    (fork.src / "vllm/fresh.py").write_text("fresh = True\n")
    command = ["make", "--no-print-directory", "fork-diff"]
    env = fork.env | nasty_settings(tmp_path)
    result = subprocess.run(command, cwd=fork.root, env=env, capture_output=True, check=True)
    assert f"different from vLLM {OLD} as released: 4 files" in result.stderr.decode()
    fork.git("add", "--all")
    wanted = fork.git("write-tree")
    fork.git("stash", "-q")
    fork.git("checkout", "-q", f"upstream/{OLD}")
    subprocess.run(["git", "apply", "--index"], cwd=fork.src, input=result.stdout, check=True)
    assert fork.git("write-tree") == wanted


def test_diff_leaves_the_users_index_alone(fork: Checkout) -> None:
    (fork.src / "vllm/fresh.py").write_text("fresh = True\n")
    before = fork.git("status", "--porcelain")
    assert "+fresh = True" in succeed(fork, "fork-diff")
    assert fork.git("status", "--porcelain") == before
    assert "added = True" not in succeed(fork, "fork-diff", "OWN=1")
    assert "vllm/fresh.py | 1 +" in succeed(fork, "fork-diff", "STAT=1")


# --- export ---------------------------------------------------------------------------------


def test_export_then_apply_gives_the_same_tree(fork: Checkout, tmp_path: Path) -> None:
    """Whatever git settings the user has, and under a hook of another repository."""
    nasty = nasty_settings(tmp_path)
    commit(fork, "vllm/kept.py", "mine = True\n", "First\n\nWith a body.")
    (fork.src / "vllm/binary.bin").write_bytes(bytes(range(256)))
    (fork.src / "vllm/__init__.py").rename(fork.src / "vllm/a name.py")
    (fork.src / "setup.py").chmod(0o755)
    commit(fork, "vllm/ünï.py", "x = 1\n", "Second")
    described = fork.git("log", "--format=%T %an %ae %aD %B")
    succeed(fork, "fork-export", **nasty)
    files = sorted(path.name for path in (fork.root / "vllm-fork/patches" / OLD).iterdir())
    assert files == ["0001-add-a-line.patch", "0002-first.patch", "0003-second.patch"]
    assert "up to date" in succeed(fork, "fork-export")  # byte for byte what it is without them
    (fork.src / "vllm/fresh.py").write_text("ignored = 'by the user only'\n")
    found = json.loads(succeed(fork, "fork-status", "JSON=1", **nasty))
    assert (found["own_commits"], found["uncommitted"]) == ([], ["?? vllm/fresh.py"])
    shutil.rmtree(fork.root / "vllm-fork/releases")
    succeed(fork, "dev", **nasty)
    assert fork.git("log", "--format=%T %an %ae %aD %B") == described
    assert fork.git("status", "--porcelain") == ""


def test_a_second_export_writes_nothing(fork: Checkout) -> None:
    commit(fork, "vllm/kept.py", "mine = True\n", "First")
    succeed(fork, "fork-export")
    folder = fork.root / "vllm-fork/patches" / OLD
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert "is up to date: 2 commits" in succeed(fork, "fork-export")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_export_says_what_is_not_in_it(fork: Checkout) -> None:
    fork.git("checkout", "-q", "-b", "other")
    commit(fork, "vllm/other.py", "x\n", "Elsewhere")
    fork.git("checkout", "-q", "main")
    (fork.src / "vllm/kept.py").write_text("edited = True\n")
    said = succeed(fork, "fork-export")
    assert "1 uncommitted edit" in said
    assert "1 commit on other branches or stashes" in said
    assert (fork.src / "vllm/kept.py").read_text() == "edited = True\n"


def test_commits_that_were_dropped_leave_the_queue_but_not_the_repository(fork: Checkout) -> None:
    dropped = commit(fork, "vllm/kept.py", "mine = True\n", "A mistake")
    succeed(fork, "fork-export")
    fork.git("reset", "-q", "--hard", "HEAD^")
    succeed(fork, "fork-export")
    assert [patch["name"] for patch in status(fork)["patches"]] == ["0001-add-a-line.patch"]
    assert dropped in reachable(fork.src)


def test_exported_commits_stay_in_reach_when_their_patches_go(fork: Checkout) -> None:
    """As after a `git checkout` of the workspace to a branch without them."""
    mine = commit(fork, "vllm/kept.py", "mine = True\n", "Mine")
    succeed(fork, "fork-export")
    (fork.root / "vllm-fork/patches" / OLD / "0002-mine.patch").unlink()
    assert "patches changed" in succeed(fork, "dev")
    assert "untouched" in (fork.src / "vllm/kept.py").read_text()
    assert mine in reachable(fork.src)


def colleagues_patch(fork: Checkout) -> Path:
    """A patch that somebody added to the folder, as a pull of the workspace would."""
    commit(fork, "vllm/colleague.py", "theirs = 1\n", "Theirs")
    succeed(fork, "fork-export")
    path = fork.root / "vllm-fork/patches" / OLD / "0002-theirs.patch"
    content = path.read_bytes()
    fork.git("reset", "-q", "--hard", "HEAD^")
    succeed(fork, "fork-export")
    for name in fork.git("for-each-ref", "--format=%(refname)", "refs/workspace/replaced").split():
        fork.git("update-ref", "-d", name)
    path.write_bytes(content)
    return path


def test_export_does_not_remove_a_patch_of_somebody_else(fork: Checkout) -> None:
    path = colleagues_patch(fork)
    commit(fork, "vllm/kept.py", "mine = True\n", "Mine")
    assert "0002-theirs.patch is not among the commits" in fail(fork, "fork-export")
    assert path.exists()
    assert "make fork-export" in succeed(fork, "dev")
    fork.git("rebase", "-q", "--onto", "refs/workspace/queue", "refs/workspace/applied")
    succeed(fork, "fork-export")
    names = [patch["name"] for patch in status(fork)["patches"]]
    assert names == ["0001-add-a-line.patch", "0002-theirs.patch", "0003-mine.patch"]
    assert succeed(fork, "dev").strip() == "· ready"


def test_a_patch_of_somebody_else_is_given_up_by_force(fork: Checkout) -> None:
    path = colleagues_patch(fork)
    commit(fork, "vllm/kept.py", "mine = True\n", "Mine")
    succeed(fork, "fork-export", "FORCE=1")
    assert not path.exists()


def test_export_refuses_a_history_that_no_queue_can_hold(fork: Checkout) -> None:
    fork.git("checkout", "-q", "-b", "side", "HEAD^")
    commit(fork, "vllm/side.py", "x\n", "Side")
    fork.git("checkout", "-q", "main")
    fork.git("merge", "-q", "--no-edit", "side")
    before = sorted((fork.root / "vllm-fork/patches" / OLD).iterdir())
    assert "is a merge" in fail(fork, "fork-export")
    assert sorted((fork.root / "vllm-fork/patches" / OLD).iterdir()) == before


def test_export_refuses_while_git_is_in_the_middle_of_something(fork: Checkout) -> None:
    fork.git("checkout", "-q", "-b", "side", "HEAD^")
    commit(fork, "vllm/envs.py", "other\n", "Side")
    with pytest.raises(subprocess.CalledProcessError):
        fork.git("cherry-pick", "main")
    assert "in the middle of a cherry-pick" in fail(fork, "fork-export")


def test_a_patch_that_does_not_apply_is_named_with_file_and_hunk(fork: Checkout) -> None:
    path = fork.root / "vllm-fork/patches" / OLD / "0001-add-a-line.patch"
    path.write_text(re.sub(r"index \w+", f"index {'1' * 40}", path.read_text()))
    before = fork.git("rev-parse", "HEAD")
    error = fail(fork, "dev")
    assert "0001-add-a-line.patch does not apply: vllm/envs.py (hunk -1,0 +2,1)" in error
    assert fork.git("rev-parse", "HEAD") == before
    assert PATCH_LINE in envs(fork)


# --- switch ---------------------------------------------------------------------------------


def test_two_releases_lie_side_by_side_each_with_its_environment(fork: Checkout) -> None:
    mine = commit(fork, "vllm/kept.py", "mine = True\n", "Mine")
    succeed(fork, "dev", f"VLLM_VERSION={NEW}")
    assert os.readlink(fork.src) == f"releases/{NEW}"
    assert (fork.src / "vllm/new_in_this_release.py").exists()
    for version, folder in ((OLD, ".venv"), (NEW, f".venv-{NEW}")):
        command = [fork.root / folder / "bin/python", "-c", "import vllm; print(vllm.__file__)"]
        result = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True)
        assert result.stdout.strip() == str(fork.tree(version) / "vllm/__init__.py")
    assert status(fork)["other_releases"] == [OLD]
    # Between prepared releases nothing is made anew.
    said = succeed(fork, "dev", f"VLLM_VERSION={OLD}")
    assert not re.search("creating|installing|unpacking|compiled", said)
    assert fork.git("rev-parse", "HEAD") == mine
    # Without VLLM_VERSION it is the release that src shows.
    succeed(fork, "dev", f"VLLM_VERSION={NEW}")
    assert succeed(fork, "dev").strip() == "· ready"
    assert os.readlink(fork.src) == f"releases/{NEW}"


def test_uncommitted_edits_refuse_the_switch_with_the_reason(fork: Checkout) -> None:
    (fork.src / "vllm/kept.py").write_text("edited = True\n")
    error = fail(fork, "dev", f"VLLM_VERSION={NEW}")
    assert "uncommitted edits (vllm/kept.py)" in error
    assert os.readlink(fork.src) == f"releases/{OLD}"
    assert (fork.src / "vllm/kept.py").read_text() == "edited = True\n"


def test_a_release_that_is_not_pinned_is_one_clear_error(fork: Checkout) -> None:
    error = fail(fork, "dev", "VLLM_VERSION=0.1.2")
    assert "vLLM 0.1.2 is not pinned; pins.toml has" in error
    assert "make fork-rebase VERSION=0.1.2" in error


def test_a_tree_that_is_not_there_costs_no_environment(fork: Checkout) -> None:
    shutil.rmtree(fork.root / f".venv-{NEW}", ignore_errors=True)
    assert "does not exist; run: make dev" in fail(fork, "fork-export", f"VLLM_VERSION={NEW}")
    assert not (fork.root / f".venv-{NEW}").exists()


# --- rebase ---------------------------------------------------------------------------------


def test_rebase_carries_the_commits_and_keeps_the_old_release(
    fork: Checkout, tmp_path: Path
) -> None:
    mine = commit(fork, "vllm/mine.py", "mine = 1\r\n", "Mine\n\nBödy.")
    said = succeed(fork, "fork-rebase", f"VERSION={NEW}", **nasty_settings(tmp_path))
    assert f"vllm-fork/src points at vLLM {NEW}, with 2 commits" in said
    assert envs(fork) == "zeroth = 0\nfirst = 1\nadded = True\nsecond = 2\nthird = 3\nfourth = 4\n"
    # Of the user's settings only who they are.
    assert fork.git("log", "-1", "--format=%an, %cn %B") == "U, Jo Doe Mine\n\nBödy."
    assert fork.git("rev-parse", "HEAD:vllm/mine.py") == blob("mine = 1\r\n")
    assert fork.git("symbolic-ref", "--short", "HEAD") == "main"
    assert fork.git("status", "--porcelain") == ""
    found = status(fork)
    assert (found["release"], len(found["own_commits"])) == (NEW, 2)
    assert mine in reachable(fork.tree(OLD))
    assert (fork.tree(OLD) / "vllm/mine.py").exists()
    succeed(fork, "fork-export")
    files = [path.name for path in sorted((fork.root / "vllm-fork/patches" / NEW).iterdir())]
    assert files == ["0001-add-a-line.patch", "0002-mine.patch"]


def conflicting(fork: Checkout) -> None:
    commit(fork, "vllm/mine.py", "mine = 1\n", "Mine")
    commit(fork, "vllm/kept.py", "mine = True\n", "Conflict")
    commit(fork, "vllm/last.py", "last = 1\n", "Last")


def test_a_conflict_leaves_the_user_in_it_with_the_files_and_the_next_command(
    fork: Checkout,
) -> None:
    conflicting(fork)
    error = fail(fork, "fork-rebase", f"VERSION={NEW}")
    for words in ("(Conflict), 3 of 4,", "conflicts in vllm/kept.py", "then: make fork-rebase",
                  "make fork-rebase ABORT=1"):  # fmt: skip
        assert words in error
    assert "<<<<<<<" in (fork.src / "vllm/kept.py").read_text()
    assert "at commit 3 of 4, conflicts in vllm/kept.py" in status(fork)["rebase"]
    for verb in ("dev", "bench", "test"):
        assert "a rebase is in progress" in fail(fork, verb)
    assert "conflicts in vllm/kept.py" in fail(fork, "fork-rebase")
    (fork.src / "vllm/kept.py").write_text("both = True\n")
    fork.git("add", "vllm/kept.py")
    assert "with 4 commits" in succeed(fork, "fork-rebase")
    assert (fork.src / "vllm/kept.py").read_text() == "both = True\n"
    assert (fork.src / "vllm/last.py").exists()
    assert status(fork)["rebase"] is None


def test_a_conflict_is_shown_in_three_versions_with_the_patch_that_it_is_of(fork: Checkout) -> None:
    conflicting(fork)
    succeed(fork, "fork-export")
    shown = fork.make("fork-rebase", f"VERSION={NEW}").stdout
    (made,) = re.findall(r"\w{7,} \(Conflict\)", shown.split("error: ")[1])
    assert shown.split("three versions:\n")[1].split("error: ")[0] == (
        "vllm/kept.py:1\n"
        f"  vLLM {NEW}:\n"
        f"    {CHANGED['vllm/kept.py']}"
        f"  vLLM {OLD}:\n"
        "    untouched = True\n"
        f"  {made}, vllm-fork/patches/{OLD}/0003-conflict.patch:\n"
        "    mine = True\n"
    )


def test_a_conflict_may_be_ended_with_gits_own_commands(fork: Checkout) -> None:
    conflicting(fork)
    fail(fork, "fork-rebase", f"VERSION={NEW}")
    fork.git("-c", "core.editor=true", "rebase", "--skip")
    assert "with 3 commits" in succeed(fork, "fork-rebase")
    assert (fork.src / "vllm/kept.py").read_text() == CHANGED["vllm/kept.py"]


def test_abort_returns_to_exactly_where_the_user_was(fork: Checkout) -> None:
    conflicting(fork)
    before = (os.readlink(fork.src), fork.git("rev-parse", "HEAD"), reachable(fork.src),
              (fork.root / "pins.toml").read_text(), status(fork))  # fmt: skip
    assert "(Conflict)" in fail(fork, "fork-rebase", f"VERSION={NEW}")
    succeed(fork, "fork-rebase", "ABORT=1")
    after = (os.readlink(fork.src), fork.git("rev-parse", "HEAD"), reachable(fork.src),
             (fork.root / "pins.toml").read_text(), status(fork))  # fmt: skip
    assert after == before
    assert not fork.tree(NEW).exists()
    assert "no rebase is in progress" in fail(fork, "fork-rebase", "ABORT=1")
    assert succeed(fork, "dev").strip() == "· ready"


def test_abort_leaves_a_release_that_was_there_as_it_was(fork: Checkout) -> None:
    succeed(fork, "dev", f"VLLM_VERSION={NEW}")
    there = commit(fork, "vllm/there.py", "x = 1\n", "There before")
    succeed(fork, "dev", f"VLLM_VERSION={OLD}")
    conflicting(fork)
    assert "(Conflict)" in fail(fork, "fork-rebase", f"VERSION={NEW}")
    succeed(fork, "fork-rebase", "ABORT=1")
    assert os.readlink(fork.src) == f"releases/{OLD}"
    succeed(fork, "dev", f"VLLM_VERSION={NEW}")
    assert fork.git("rev-parse", "HEAD") == there
    assert fork.git("symbolic-ref", "--short", "HEAD") == "main"
    assert fork.git("status", "--porcelain") == ""


def test_what_the_new_releases_queue_has_is_not_carried_twice(fork: Checkout) -> None:
    succeed(fork, "fork-rebase", f"VERSION={NEW}")
    succeed(fork, "fork-export")
    succeed(fork, "dev", f"VLLM_VERSION={OLD}")
    commit(fork, "vllm/mine.py", "mine = 1\n", "Mine")
    assert "rebasing 1 commit from" in succeed(fork, "fork-rebase", f"VERSION={NEW}")
    assert fork.git("log", "--format=%s").splitlines()[:2] == ["Mine", "Add a line"]
    assert [line.split(" ", 1)[1] for line in status(fork)["own_commits"]] == ["Mine"]


def test_a_dirty_tree_refuses_to_be_carried(fork: Checkout) -> None:
    (fork.src / "vllm/kept.py").write_text("edited = True\n")
    error = fail(fork, "fork-rebase", f"VERSION={NEW}")
    assert "uncommitted edits (vllm/kept.py)" in error
    assert (fork.src / "vllm/kept.py").read_text() == "edited = True\n"
    assert not fork.tree(NEW).exists()
    assert status(fork)["rebase"] is None


def test_a_rebase_needs_a_release_and_another_one(fork: Checkout) -> None:
    assert "name the release" in fail(fork, "fork-rebase")
    assert f"is vLLM {OLD} already" in fail(fork, "fork-rebase", f"VERSION={OLD}")


# --- killed at any moment -------------------------------------------------------------------


def killed(fork: Checkout, longest: float, *arguments: str) -> None:
    """Start a verb and kill it, with all it started, after a random time."""
    process = fork.start(*arguments)
    time.sleep(random.SystemRandom().uniform(0.05, longest))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def length(fork: Checkout, *arguments: str) -> float:
    started = time.perf_counter()
    fork.make(*arguments)
    return time.perf_counter() - started


@pytest.mark.slow
def test_a_killed_export_loses_no_commit_and_the_next_one_is_whole(fork: Checkout) -> None:
    for number in range(6):
        commit(fork, f"vllm/mine_{number}.py", f"x = {number}\n" * 50, f"Commit {number}")
    before, described = reachable(fork.src), fork.git("log", "--format=%T %B")
    longest = length(fork, "fork-export")
    for attempt in range(KILLS):
        commit(fork, "vllm/kept.py", f"x = {attempt}\n", f"Attempt {attempt}")
        before, described = reachable(fork.src), fork.git("log", "--format=%T %B")
        killed(fork, longest, "fork-export")
        assert before <= reachable(fork.src)
        succeed(fork, "fork-export")
        assert before <= reachable(fork.src)
        shutil.rmtree(fork.tree(OLD))
        succeed(fork, "dev")
        assert fork.git("log", "--format=%T %B") == described
        assert list((fork.root / "vllm-fork").rglob(".partial-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("conflict", [False, True])
def test_a_killed_rebase_loses_no_commit_and_can_be_ended_either_way(
    fork: Checkout, conflict: bool
) -> None:
    if conflict:
        conflicting(fork)
    else:
        for number in range(4):
            commit(fork, f"vllm/mine_{number}.py", f"x = {number}\n", f"Commit {number}")
    before, head = reachable(fork.src), fork.git("rev-parse", "HEAD")
    longest = length(fork, "fork-rebase", f"VERSION={NEW}")
    back_to_start(fork)
    for attempt in range(KILLS):
        killed(fork, longest, "fork-rebase", f"VERSION={NEW}")
        assert before <= reachable(fork.tree(OLD))
        if attempt % 2:
            killed(fork, longest, "fork-rebase")
        result = fork.make("fork-rebase", f"VERSION={NEW}")
        if conflict:
            assert "conflicts in vllm/kept.py" in result.stdout
            (fork.src / "vllm/kept.py").write_text("both = True\n")
            fork.git("add", "vllm/kept.py")
            succeed(fork, "fork-rebase")
        else:
            # The kill may have come after the end.
            assert result.returncode == 0 or f"is vLLM {NEW} already" in result.stdout
        subjects = fork.git("log", "--reverse", "--format=%s", f"upstream/{NEW}..HEAD").split("\n")
        assert subjects[-1] == ("Last" if conflict else "Commit 3")
        assert len(subjects) == len(set(subjects)) == (4 if conflict else 5)
        assert before <= reachable(fork.tree(OLD))
        back_to_start(fork)
        # And the way back, from wherever it was killed.
        killed(fork, longest, "fork-rebase", f"VERSION={NEW}")
        killed(fork, longest, "fork-rebase", "ABORT=1")
        fork.make("fork-rebase", "ABORT=1")
        assert status(fork)["rebase"] is None
        if os.readlink(fork.src) == f"releases/{OLD}":
            assert fork.git("rev-parse", "HEAD") == head
        assert before <= reachable(fork.tree(OLD))
        back_to_start(fork)


def back_to_start(fork: Checkout) -> None:
    """The new release gone, the old one shown; the old tree is not touched."""
    fork.make("fork-rebase", "ABORT=1")
    fork.src.unlink()
    fork.src.symlink_to(f"releases/{OLD}")
    shutil.rmtree(fork.tree(NEW), ignore_errors=True)


@pytest.mark.slow
def test_a_killed_switch_shows_one_release_or_the_other(fork: Checkout) -> None:
    mine = commit(fork, "vllm/mine.py", "mine = 1\n", "Mine")
    succeed(fork, "dev", f"VLLM_VERSION={NEW}")
    longest = length(fork, "dev", f"VLLM_VERSION={OLD}")
    for attempt in range(KILLS):
        killed(fork, longest, "dev", f"VLLM_VERSION={(NEW, OLD)[attempt % 2]}")
        assert os.readlink(fork.src) in (f"releases/{OLD}", f"releases/{NEW}")
        assert mine in reachable(fork.tree(OLD))
    succeed(fork, "dev", f"VLLM_VERSION={OLD}")
    assert fork.git("rev-parse", "HEAD") == mine
    assert list((fork.root / "vllm-fork").glob(".partial-*")) == []
