# SPDX-License-Identifier: Apache-2.0
"""`make fork-rebase VERSION=x`: carry the tree's commits over to another vLLM release.

Steps: look the release up, write down what is about to happen, unpack the release beside the old
one, fetch the old tree's commits into it, and let git rebase them (three ways, on whole trees).
Then the release's hashes go into pins.toml and vllm-fork/src shows its tree.

The old tree is only read. So going back is: show it again, and remove what was made. Every step
looks at what is there first, so a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from shlex import quote

from workspace import verbs
from workspace.environment import lock
from workspace.environment.fetch import fetch
from workspace.fork import patch_queue, pin_release, prepare, rebase_state, tree_state
from workspace.fork.patch_queue import short
from workspace.fork.rebase_state import Rebase, conflicts, in_git
from workspace.fork.tree_state import require_no_operation, shown, state
from workspace.host import setup_lock
from workspace.host.errors import WorkspaceError
from workspace.host.files import PARTIAL
from workspace.host.git import committer, git, git_bytes
from workspace.host.git import run as run_git
from workspace.host.text import plural, say
from workspace.pins import release
from workspace.pins.model import Artifact, load

HELD = "refs/workspace/rebase"
"""Where the new tree keeps the commits that are carried into it."""


def run(options: verbs.ForkRebase) -> None:
    """Begin a rebase to VERSION=, go on with the one under way, or (ABORT=1) take it back.

    Raises:
        WorkspaceError: it cannot begin; or git stopped at a conflict, and the user is in it.
    """
    rebase = rebase_state.read()
    if options.abort:
        _abort(rebase, options.force)
        return
    if rebase is None:
        rebase = _begin(options.version)
    elif options.version not in (None, rebase.target):
        raise WorkspaceError(f"a rebase is under way {rebase_state.summary()}")
    rebase = _unpack(rebase)
    rebase = _replay(rebase)
    _finish(rebase)


# --- the steps ------------------------------------------------------------------------------


def _begin(version: str | None) -> Rebase:
    """Check that the old tree can be carried, look up the new release, write both down."""
    if not version:
        raise WorkspaceError("name the release: make fork-rebase VERSION=0.26.0")
    origin = release.selected()
    tree = release.tree(origin)
    found = state(tree)
    if found is None:
        raise WorkspaceError(f"{shown(tree)} is not there; run: make dev")
    if version == origin:
        raise WorkspaceError(f"{shown(tree)} is vLLM {version} already; name another release")
    require_no_operation(tree)
    if found.uncommitted:
        names = ", ".join(entry[3:] for entry in found.uncommitted[:3])
        raise WorkspaceError(
            f"{shown(tree)} has uncommitted edits ({names}), which a rebase would leave behind; "
            "commit or stash them first, then run this again"
        )
    if not patch_queue.commits(tree, prepare.upstream_tag(origin), "HEAD"):
        raise WorkspaceError(f"{shown(tree)} has no commits over vLLM {origin}; nothing to carry")
    target = release.tree(version)
    if target.exists():
        there = state(target)
        require_no_operation(target)
        if there and there.uncommitted:
            raise WorkspaceError(
                f"{shown(target)} is there and has uncommitted edits; commit or stash them first"
            )
    pins = "" if version in load().vllm.release else pin_release.look_up(version, like=origin)
    rebase = Rebase(origin, version, found.head, made=not target.exists(), pins=pins)
    rebase_state.write(rebase)
    return rebase


def _unpack(rebase: Rebase) -> Rebase:
    """The new release's tree, with the queue that it may have, and its place to return to."""
    if not rebase.tree.exists():
        pinned = load().vllm.release.get(rebase.target)
        sdist: Artifact = pinned.sdist if pinned else pin_release.sdist(rebase.pins)
        wanted = pinned.tree if pinned else ""
        patches = patch_queue.files(rebase.target)
        made = prepare.create(rebase.target, fetch(sdist), wanted, patches)
        if not pinned:
            rebase = replace(rebase, pins=pin_release.with_tree(rebase.pins, made))
    elif not rebase.onto and not pin_release.has_tree(rebase.pins):
        # Killed between the tree and the note of its hash.
        tag = f"{prepare.upstream_tag(rebase.target)}^{{tree}}"
        made = git("rev-parse", tag, tree=rebase.tree).strip()
        rebase = replace(rebase, pins=pin_release.with_tree(rebase.pins, made))
    if not rebase.onto:
        onto = git("rev-parse", "HEAD", tree=rebase.tree).strip()
        rebase = replace(rebase, onto=onto, branch=tree_state.branch(rebase.tree))
        rebase_state.write(rebase)
    return rebase


def _replay(rebase: Rebase) -> Rebase:
    """Have git carry the commits over, from the start or from where the user resolved."""
    tree = rebase.tree
    if not rebase.stopped:
        _start_afresh(rebase)
        origin = release.tree(rebase.origin)
        base = patch_queue.commit_id(origin, prepare.upstream_tag(rebase.origin))
        # By hand, because `git fetch` refuses a repository of another user, as in a container.
        objects = git_bytes(
            "pack-objects",
            "-q",
            "--revs",
            "--stdout",
            tree=origin,
            stdin=f"{rebase.tip}\n".encode(),
        )
        git("index-pack", "--stdin", tree=tree, stdin=objects)
        for name, commit in (("base", base), ("tip", rebase.tip)):
            git("update-ref", f"{HELD}/{name}", commit, tree=tree)
        todo = _todo(rebase)
        say(f"carrying {plural(len(todo), 'commit')} from vLLM {rebase.origin} to {rebase.target}")
        plan = tree / ".git" / "workspace-todo"
        plan.write_text("".join(f"pick {commit}\n" for commit in todo))
        _git_rebase(
            tree, "--interactive", "--no-autosquash", "--no-autostash", "--reapply-cherry-picks",
            "--empty=drop", "--onto", rebase.onto, f"{HELD}/base", f"{HELD}/tip",
            editor=f"cp {quote(str(plan))}",
        )  # fmt: skip
    elif in_git(tree) and not conflicts(tree):
        _git_rebase(tree, "--continue")
    if in_git(tree):
        rebase = replace(rebase, stopped=True)
        rebase_state.write(rebase)
        release.activate(rebase.target)
        raise WorkspaceError(_conflict(rebase))
    below = git("merge-base", rebase.onto, "HEAD", tree=tree, check=False).strip()
    if below != rebase.onto:
        raise WorkspaceError(
            f"{shown(tree)} is no longer on top of vLLM {rebase.target}: the rebase was ended "
            "there by hand; go back with: make fork-rebase ABORT=1"
        )
    return rebase


def _finish(rebase: Rebase) -> None:
    """Put the branch where the commits are, the hashes into pins.toml, and show the tree."""
    tree = rebase.tree
    git("checkout", "-q", "-B", rebase.branch, "HEAD", tree=tree)
    carried = patch_queue.commits(tree, rebase.onto, "HEAD")
    if rebase.pins:
        pin_release.add(rebase.pins, rebase.target)
    release.activate(rebase.target)
    rebase_state.remove()
    _drop_refs(rebase)
    say(
        f"vllm-fork/src shows vLLM {rebase.target} now, with {plural(len(carried), 'commit')} on it"
    )
    for commit in carried:
        say(f"  {short(tree, commit)}")
    say(f"vLLM {rebase.origin} stays as it was in {shown(release.tree(rebase.origin))}")
    if rebase.pins:
        say(f"pins.toml has vLLM {rebase.target} now; resolving its lock")
        lock.run(only=rebase.target)
    say(f"next: make dev, make bench, make fork-export (patches/{rebase.target})")


def _abort(rebase: Rebase | None, force: bool) -> None:
    """Show the old tree again, remove what the rebase made."""
    if rebase is None:
        raise WorkspaceError("no rebase is under way")
    if release.tree(rebase.origin).exists():
        release.activate(rebase.origin)
    tree = rebase.tree
    if tree.exists() and rebase.made:
        if not force:
            _refuse_to_lose_branches(tree)
        gone = tree.with_name(f"{PARTIAL}aborted")
        shutil.rmtree(gone, ignore_errors=True)
        tree.rename(gone)
        shutil.rmtree(gone)
    elif tree.exists() and rebase.onto:
        _start_afresh(rebase)
        git("checkout", "-q", rebase.branch, tree=tree)
    _drop_refs(rebase)
    rebase_state.remove()
    say(f"vllm-fork/src shows vLLM {rebase.origin}, as before the rebase")


# --- git's part -----------------------------------------------------------------------------


def _git_rebase(tree: Path, *arguments: str, editor: str = "true") -> None:
    """git rebase, with the set-up lock: where we are killed, the next run waits for it.

    Raises:
        WorkspaceError: it did not even begin.
    """
    editors = {"GIT_SEQUENCE_EDITOR": editor, "GIT_EDITOR": "true"}
    result = run_git(
        "rebase",
        *arguments,
        tree=tree,
        env=editors | committer(tree),  # authors stay
        pass_fds=setup_lock.held(),
    )
    if result.returncode and not in_git(tree):
        reason = (result.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise WorkspaceError(f"git rebase in {shown(tree)}: {reason}")


def _todo(rebase: Rebase) -> list[str]:
    """The commits to carry: those that the new release's queue has already, by subject, are not.

    Raises:
        WorkspaceError: there are none.
    """
    tree = rebase.tree
    commits = patch_queue.commits(tree, f"{HELD}/base", f"{HELD}/tip")
    upstream = prepare.upstream_tag(rebase.target)
    there = {_subject(tree, one) for one in patch_queue.commits(tree, upstream, rebase.onto)}
    todo = [one for one in commits if _subject(tree, one) not in there]
    if not todo:
        raise WorkspaceError(
            f"vLLM {rebase.target} has all {len(commits)} commits of vLLM {rebase.origin} in its "
            "own queue; nothing to carry. Go back with: make fork-rebase ABORT=1"
        )
    return todo


def _subject(tree: Path, commit: str) -> str:
    return git("log", "-1", "--format=%s", commit, tree=tree).strip()


def _start_afresh(rebase: Rebase) -> None:
    """Undo what a killed git left in the new tree. Nobody has worked in it yet: it was clean when
    the rebase began, and a rebase that stopped for the user is not started again."""
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
    tree = rebase.tree
    done, total = rebase_state.progress(tree)
    stopped = git("rev-parse", "-q", "--verify", "REBASE_HEAD", tree=tree, check=False).strip()
    what = f"{short(tree, stopped)}, {done} of {total}," if stopped else f"commit {done} of {total}"
    names = conflicts(tree)
    where = ", ".join(names) if names else "no file, but git wants a decision (git status says)"
    return (
        f"{what} does not fit vLLM {rebase.target} by itself: conflicts in {where}; fix them in "
        "vllm-fork/src, git add them, then: make fork-rebase (or back: make fork-rebase ABORT=1)"
    )


def _refuse_to_lose_branches(tree: Path) -> None:
    listed = git("for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/stash", tree=tree)
    own = [name for name in listed.split() if name != "main"]
    if own:
        raise WorkspaceError(
            f"{shown(tree)} holds {', '.join(own)}, which would go with it; fetch it from there "
            "into another repository, or give it up: make fork-rebase ABORT=1 FORCE=1"
        )


def _drop_refs(rebase: Rebase) -> None:
    for name in ("tip", "base"):
        if rebase.tree.exists():
            git("update-ref", "-d", f"{HELD}/{name}", tree=rebase.tree)
