# SPDX-License-Identifier: Apache-2.0
"""`make fork-rebase VERSION=x`: rebase the commits of the tree onto another vLLM release.

Steps: look up the release, write the state file, unpack the release beside the old one, fetch the
commits of the old tree into it, and let git rebase them (three-way merges of whole trees). Then the
pins of the release are added to pins.toml and vllm-fork/src points at its tree.

The old tree is only read, so an abort points vllm-fork/src at it again and removes the new tree.
Every step checks what exists already, so a run continues where a killed one stopped.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from shlex import quote

from workspace import verbs
from workspace.environment import lock
from workspace.environment.fetch import fetch
from workspace.fork import conflict, patch_queue, pin_release, prepare, rebase_state, tree_state
from workspace.fork.patch_queue import is_ancestor, short, subject
from workspace.fork.rebase_state import Rebase, conflicts, in_git
from workspace.fork.tree_state import require, require_no_edits, require_no_operation, shown
from workspace.host import setup_lock
from workspace.host.errors import WorkspaceError
from workspace.host.files import PARTIAL
from workspace.host.git import committer, git
from workspace.host.git import run as run_git
from workspace.host.text import last_line, plural, say
from workspace.pins import release
from workspace.pins.model import load

REFS = "refs/workspace/rebase"
"""Refs in the new tree for the first and last of the old tree's commits."""


def run(options: verbs.ForkRebase) -> None:
    """Start a rebase to VERSION=, continue the one in progress, or (ABORT=1) undo it.

    Raises:
        WorkspaceError: it cannot start, or git stopped at a conflict that the user has to resolve.
    """
    rebase = rebase_state.read()
    if options.abort:
        _abort(rebase, options.force)
        return
    if rebase is None:
        rebase = _begin(options.version)
    elif options.version not in (None, rebase.target):
        raise WorkspaceError(f"a rebase is in progress {rebase_state.summary()}")
    rebase = _unpack(rebase)
    _replay(rebase)
    _finish(rebase)


# --- the steps ------------------------------------------------------------------------------


def _begin(version: str | None) -> Rebase:
    """Check that both trees allow a rebase, look up the new release, write the state file."""
    if not version:
        raise WorkspaceError("name the release: make fork-rebase VERSION=0.33.0")
    origin = release.selected()
    tree, target = release.tree(origin), release.tree(version)
    tip = require(tree).head
    if version == origin:
        raise WorkspaceError(f"{shown(tree)} is vLLM {version} already; name another release")
    require_no_operation(tree)
    require_no_edits(tree, ", which a rebase would leave behind")
    if not patch_queue.commits(tree, prepare.upstream_tag(origin), "HEAD"):
        raise WorkspaceError(f"{shown(tree)} has no commits on top of vLLM {origin} to rebase")
    require_no_operation(target)
    require_no_edits(target, "")
    pins = "" if version in load().vllm.release else pin_release.look_up(version, like=origin)
    rebase = Rebase(origin, version, tip, made=not target.exists(), pins=pins)
    rebase_state.write(rebase)
    return rebase


def _unpack(rebase: Rebase) -> Rebase:
    """Create the new tree, with the patches of its release; record the commit to return to."""
    if not rebase.tree.exists():
        pinned = load().vllm.release.get(rebase.target)
        sdist = pinned.sdist if pinned else pin_release.sdist(rebase.pins)
        wanted = pinned.tree if pinned else ""
        prepare.create(rebase.target, fetch(sdist), wanted, patch_queue.files(rebase.target))
    if not rebase.onto:
        pristine = _hash(rebase.tree, f"{prepare.upstream_tag(rebase.target)}^{{tree}}")
        rebase = replace(
            rebase,
            pins=pin_release.with_tree(rebase.pins, pristine),
            onto=_hash(rebase.tree, "HEAD"),
            branch=tree_state.branch(rebase.tree),
        )
        rebase_state.write(rebase)
    return rebase


def _replay(rebase: Rebase) -> None:
    """Let git rebase the commits, from the start or from where the user resolved a conflict."""
    tree = rebase.tree
    if not rebase.stopped:
        _reset(rebase)
        origin = release.tree(rebase.origin)
        base = patch_queue.commit_id(origin, prepare.upstream_tag(rebase.origin))
        # Not `git fetch`, which refuses a repository of another user, as in a container.
        pack = ("pack-objects", "-q", "--revs", "--stdout")
        objects = run_git(*pack, tree=origin, stdin=f"{rebase.tip}\n".encode()).stdout
        git("index-pack", "--stdin", tree=tree, stdin=objects)
        for name, commit in (("base", base), ("tip", rebase.tip)):
            git("update-ref", f"{REFS}/{name}", commit, tree=tree)
        todo = _todo(rebase)
        say(f"rebasing {plural(len(todo), 'commit')} from vLLM {rebase.origin} to {rebase.target}")
        plan = tree / ".git" / "workspace-todo"
        plan.write_text("".join(f"pick {commit}\n" for commit in todo))
        _git_rebase(
            tree, "--interactive", "--no-autosquash", "--no-autostash", "--reapply-cherry-picks",
            "--empty=drop", "--onto", rebase.onto, f"{REFS}/base", f"{REFS}/tip",
            editor=f"cp {quote(str(plan))}",
        )  # fmt: skip
    elif in_git(tree) and not conflicts(tree):
        _git_rebase(tree, "--continue")
    if in_git(tree):
        rebase_state.write(replace(rebase, stopped=True))
        release.activate(rebase.target)
        raise WorkspaceError(_conflict(rebase))
    if not is_ancestor(tree, rebase.onto, "HEAD"):
        raise WorkspaceError(
            f"{shown(tree)} is no longer based on vLLM {rebase.target}, because its rebase was "
            "ended with git; undo it with: make fork-rebase ABORT=1"
        )


def _finish(rebase: Rebase) -> None:
    """Move the branch to the commits, add the pins to pins.toml, and activate the release."""
    tree = rebase.tree
    git("checkout", "-q", "-B", rebase.branch, "HEAD", tree=tree)
    commits = patch_queue.commits(tree, rebase.onto, "HEAD")
    if rebase.pins:
        pin_release.add(rebase.pins, rebase.target)
    release.activate(rebase.target)
    _remove_state(rebase)
    say(f"vllm-fork/src points at vLLM {rebase.target}, with {plural(len(commits), 'commit')}:")
    for commit in commits:
        say(f"  {short(tree, commit)}")
    say(f"{shown(release.tree(rebase.origin))} is unchanged")
    if rebase.pins:
        say(f"pins.toml has vLLM {rebase.target} now; resolving its lock")
        lock.run(only=rebase.target)
    say(f"next: make dev, make bench, make fork-export (patches/{rebase.target})")


def _abort(rebase: Rebase | None, force: bool) -> None:
    """Activate the old release again, remove the new tree or reset it."""
    if rebase is None:
        raise WorkspaceError("no rebase is in progress")
    if release.tree(rebase.origin).exists():
        release.activate(rebase.origin)
    tree = rebase.tree
    removed = tree.with_name(f"{PARTIAL}aborted")
    shutil.rmtree(removed, ignore_errors=True)  # of an abort that was killed
    if tree.exists() and rebase.made:
        if not force:
            _refuse_to_lose_branches(tree)
        tree.rename(removed)
        shutil.rmtree(removed)
    elif tree.exists() and rebase.onto:
        _reset(rebase)
        git("checkout", "-q", rebase.branch, tree=tree)
    _remove_state(rebase)
    say(f"vllm-fork/src points at vLLM {rebase.origin}, as before the rebase")


# --- git ------------------------------------------------------------------------------------


def _git_rebase(tree: Path, *arguments: str, editor: str = "true") -> None:
    """git rebase, with the set-up lock: if we are killed, the next run waits for it.

    Raises:
        WorkspaceError: it did not start.
    """
    editors = {"GIT_SEQUENCE_EDITOR": editor, "GIT_EDITOR": "true"}
    env = editors | committer(tree)  # authors stay
    fds = setup_lock.held()
    command = (*conflict.STYLE, "rebase", *arguments)
    result = run_git(*command, tree=tree, env=env, check=False, pass_fds=fds)
    if result.returncode and not in_git(tree):
        reason = last_line(result.stderr.decode(errors="replace"))
        raise WorkspaceError(f"git rebase failed in {shown(tree)}: {reason}")


def _todo(rebase: Rebase) -> list[str]:
    """The commits to rebase, without those whose subject is among the new release's patches.

    Raises:
        WorkspaceError: there are none.
    """
    tree = rebase.tree
    commits = patch_queue.commits(tree, f"{REFS}/base", f"{REFS}/tip")
    patches = patch_queue.commits(tree, prepare.upstream_tag(rebase.target), rebase.onto)
    subjects = {subject(tree, commit) for commit in patches}
    todo = [commit for commit in commits if subject(tree, commit) not in subjects]
    if not todo:
        raise WorkspaceError(
            f"the patches of vLLM {rebase.target} include all {len(commits)} commits of vLLM "
            f"{rebase.origin}: nothing to rebase. Undo it with: make fork-rebase ABORT=1"
        )
    return todo


def _hash(tree: Path, name: str) -> str:
    return git("rev-parse", name, tree=tree).strip()


def _reset(rebase: Rebase) -> None:
    """Undo what a killed git left in the new tree. Nobody has worked in it yet: it was clean when
    the rebase began, and a rebase that stopped for the user does not start again."""
    folder = rebase.tree / ".git"
    for name in ("index.lock", "HEAD.lock"):
        (folder / name).unlink(missing_ok=True)
    for name in ("rebase-merge", "rebase-apply"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("CHERRY_PICK_HEAD", "REBASE_HEAD", "MERGE_MSG", "AUTO_MERGE"):
        (folder / name).unlink(missing_ok=True)
    git("checkout", "-q", "--force", "--detach", rebase.onto, tree=rebase.tree)
    if not rebase.stopped:
        git("clean", "-qfd", tree=rebase.tree)


def _conflict(rebase: Rebase) -> str:
    tree, number = rebase.tree, rebase_state.position(rebase.tree)
    stopped = git("rev-parse", "-q", "--verify", "REBASE_HEAD", tree=tree, check=False).strip()
    what = f"{short(tree, stopped)}, {number}," if stopped else f"commit {number}"
    if stopped and (places := conflict.places(rebase, stopped)):
        say(f"the conflict, each place in three versions:\n{places}")
    where = ", ".join(conflicts(tree)) or "no file, but git needs a decision (see git status)"
    return (
        f"{what} does not apply to vLLM {rebase.target}: conflicts in {where}; resolve them in "
        "vllm-fork/src, git add the files, then: make fork-rebase (or to undo it: make fork-rebase "
        "ABORT=1)"
    )


def _refuse_to_lose_branches(tree: Path) -> None:
    listed = git("for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/stash", tree=tree)
    branches = [name for name in listed.split() if name != "main"]
    if branches:
        raise WorkspaceError(
            f"{shown(tree)} has {', '.join(branches)}, which would be deleted; fetch them into "
            "another repository, or discard them: make fork-rebase ABORT=1 FORCE=1"
        )


def _remove_state(rebase: Rebase) -> None:
    for name in ("tip", "base"):
        if rebase.tree.exists():
            git("update-ref", "-d", f"{REFS}/{name}", tree=rebase.tree)
    rebase_state.FILE.unlink(missing_ok=True)
