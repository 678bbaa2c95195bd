# SPDX-License-Identifier: Apache-2.0
"""`make fork-export`: the commits of the tree, written as the release's queue of patches.

Steps: read the commits after the pristine release, write them as patches in memory, prove that
these make the same tree again, then put the files in place and write down that they are applied.
The tree and its branches are not touched. A kill leaves files of both queues at most, and the next
export sets that right, because the commits are all still there.
"""

from __future__ import annotations

from workspace import verbs
from workspace.fork import patch_queue, prepare
from workspace.fork.tree_state import APPLIED, ForkState, require_no_operation, shown, state
from workspace.host.errors import WorkspaceError
from workspace.host.files import remove_partial, write_file
from workspace.host.git import git
from workspace.host.paths import PATCHES
from workspace.host.text import plural, say
from workspace.pins import release


def run(options: verbs.ForkExport) -> None:
    """Export the commits of the branch that is checked out.

    Raises:
        WorkspaceError: no tree, a history that no queue can hold, or a full disk.
    """
    version = release.selected()
    tree = release.tree(version)
    found = state(tree)
    if found is None:
        raise WorkspaceError(f"{shown(tree)} is not there; run: make dev")
    require_no_operation(tree)
    base = prepare.upstream_tag(version)
    commits = patch_queue.commits(tree, base, "HEAD")
    patches = [patch_queue.read_commit(tree, commit) for commit in commits]
    named = {
        patch_queue.file_name(number, patch): patch_queue.as_file(patch)
        for number, patch in enumerate(patches, 1)
    }
    if not options.force:
        _refuse_to_lose_patches(version, named, found)
    _prove(version, named, found.head)
    changed = _write(version, named)
    digest = patch_queue.digest(patch_queue.files(version))
    if found.applied != found.head or found.patches_digest != digest:
        prepare.record(tree, found.head, digest)
    _report(version, len(named), changed, patches)
    for line in _left_out(version):
        say(line)


def _refuse_to_lose_patches(version: str, named: dict[str, bytes], found: ForkState) -> None:
    """Raise where the folder has a patch that no commit here ever was: somebody else's, say.

    What a killed export left there are commits of this tree.
    """
    paths = patch_queue.files(version)
    if patch_queue.digest(paths) == found.patches_digest:
        return
    tree = release.tree(version)
    base = prepare.upstream_tag(version)
    ever = ["HEAD", APPLIED, f"--glob={prepare.REPLACED}/*", "--branches", f"^{base}"]
    commits = git("rev-list", *ever, tree=tree).split()
    known = {patch_queue.as_file(patch_queue.read_commit(tree, one)) for one in commits}
    for path in paths:
        content = path.read_bytes()
        if content not in known and named.get(path.name) != content:
            raise WorkspaceError(
                f"{shown(path)} is not among the commits of {shown(tree)}, and exporting would "
                "remove it; bring it in with make dev (with commits of your own it says how), or "
                "give it up with FORCE=1"
            )


def _prove(version: str, named: dict[str, bytes], head: str) -> None:
    """Apply what would be written, and compare the trees hash for hash."""
    tree = release.tree(version)
    read = [(name, patch_queue.from_file(content)) for name, content in named.items()]
    tip = patch_queue.commit_all(tree, prepare.upstream_tag(version), read)
    made, wanted = (git("rev-parse", f"{one}^{{tree}}", tree=tree) for one in (tip, head))
    if made != wanted:
        names = git("diff", "--name-only", tip, head, tree=tree).split("\n")[0]
        raise WorkspaceError(
            f"the patches would not make the same tree again ({names} differs), so nothing was "
            "written; please report it with that commit"
        )


def _write(version: str, named: dict[str, bytes]) -> int:
    """Bring the folder to what is named; how many files changed."""
    folder = PATCHES / version
    remove_partial(folder)
    changed = 0
    for name, content in named.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != content:
            write_file(path, content)
            changed += 1
    for path in patch_queue.files(version):
        if path.name not in named:
            path.unlink()
            changed += 1
    return changed


def _report(version: str, count: int, changed: int, patches: list[patch_queue.Patch]) -> None:
    where = f"vllm-fork/patches/{version}"
    added = sum(patch.lines[0] for patch in patches)
    held = "the one commit" if count == 1 else f"all {count} commits"
    if not changed:
        say(f"{where} holds {held} already, {plural(added, 'line')} added")
        return
    made = f"{plural(count, 'patch')}, {plural(added, 'line')} added"
    say(f"{where}: {made}; commit that folder to keep them")
    for number, patch in enumerate(patches, 1):
        if removed := patch.lines[1]:
            name = patch_queue.file_name(number, patch)
            say(f"{name} removes {plural(removed, 'upstream line')}")


def _left_out(version: str) -> list[str]:
    """What the queue does not hold, in words."""
    found = state(release.tree(version))
    left = []
    if found and found.uncommitted:
        left.append(f"not in it: {plural(len(found.uncommitted), 'uncommitted edit')}")
    if found and found.own_commits:
        left.append(
            f"not in it: {plural(len(found.own_commits), 'commit')} of other branches or stashes"
        )
    return left
