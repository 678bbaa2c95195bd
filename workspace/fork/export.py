# SPDX-License-Identifier: Apache-2.0
"""`make fork-export`: write the commits of the tree as the patches of the release.

Steps: read the commits after the pristine release, convert them to patches in memory, verify that
these reproduce the tree, then write the files and record that they are applied. The tree and its
branches are not changed. A kill may leave old and new files together; the next export repairs
that, because all commits still exist.
"""

from __future__ import annotations

from workspace import verbs
from workspace.fork import patch_queue, prepare
from workspace.fork.tree_state import APPLIED, ForkState, require, require_no_operation, shown
from workspace.host.errors import WorkspaceError
from workspace.host.files import remove_partial, write_file
from workspace.host.git import git
from workspace.host.paths import PATCHES
from workspace.host.text import plural, say
from workspace.pins import release


def run(options: verbs.ForkExport) -> None:
    """Export the commits of the branch that is checked out.

    Raises:
        WorkspaceError: no tree, a history that patches cannot represent, or a full disk.
    """
    before = require()
    version, tree = before.version, release.tree(before.version)
    require_no_operation(tree)
    commits = patch_queue.commits(tree, prepare.upstream_tag(version), "HEAD")
    patches = [patch_queue.read_commit(tree, commit) for commit in commits]
    names = [patch_queue.file_name(number, patch) for number, patch in enumerate(patches, 1)]
    contents = dict(zip(names, map(patch_queue.as_file, patches), strict=True))
    if not options.force:
        _refuse_to_lose_patches(before, contents)
    _verify(before, contents)
    changed = _write(version, contents)
    digest = patch_queue.digest(patch_queue.files(version))
    if before.applied != before.head or before.patches_digest != digest:
        prepare.record(tree, before.head, digest)

    folder, added = f"vllm-fork/patches/{version}", sum(patch.lines[0] for patch in patches)
    if changed:
        total = f"{plural(len(names), 'patch')}, {plural(added, 'line')} added"
        say(f"{folder}: {total}; commit that folder to keep them")
        for name, patch in zip(names, patches, strict=True):
            if removed := patch.lines[1]:
                say(f"{name} removes {plural(removed, 'upstream line')}")
    else:
        total = f"{plural(len(names), 'commit')}, {plural(added, 'line')} added"
        say(f"{folder} is up to date: {total}")
    after = require()
    if after.uncommitted:
        say(f"not exported: {plural(len(after.uncommitted), 'uncommitted edit')}")
    if after.own_commits:
        say(
            f"not exported: {plural(len(after.own_commits), 'commit')} on other branches or stashes"
        )


def _refuse_to_lose_patches(before: ForkState, contents: dict[str, bytes]) -> None:
    """Raise if the folder has a patch that was never a commit of this tree, e.g. somebody else's.

    The files of a killed export are commits of this tree.
    """
    paths = patch_queue.files(before.version)
    if patch_queue.digest(paths) == before.patches_digest:
        return
    tree, base = release.tree(before.version), prepare.upstream_tag(before.version)
    revisions = ["HEAD", APPLIED, f"--glob={prepare.REPLACED}/*", "--branches", f"^{base}"]
    commits = git("rev-list", *revisions, tree=tree).split()
    known = {patch_queue.as_file(patch_queue.read_commit(tree, commit)) for commit in commits}
    for path in paths:
        content = path.read_bytes()
        if content not in known and contents.get(path.name) != content:
            raise WorkspaceError(
                f"{shown(path)} is not among the commits of {shown(tree)}, and the export would "
                "remove it; apply it with make dev (if you have local commits, it prints how), or "
                "discard it with FORCE=1"
            )


def _verify(before: ForkState, contents: dict[str, bytes]) -> None:
    """Apply the patches, and compare the trees by hash."""
    tree, head = release.tree(before.version), before.head
    patches = [(name, patch_queue.from_file(content)) for name, content in contents.items()]
    tip = patch_queue.commit_all(tree, prepare.upstream_tag(before.version), patches)
    if names := git("diff-tree", "-r", "--name-only", tip, head, tree=tree).split("\n")[0]:
        raise WorkspaceError(
            f"the patches would not reproduce the tree ({names} differs), so nothing was written; "
            "please report it with that commit"
        )


def _write(version: str, contents: dict[str, bytes]) -> bool:
    """Write the files and remove all other patches; whether anything changed."""
    folder = PATCHES / version
    remove_partial(folder)
    before = {path.name: path.read_bytes() for path in patch_queue.files(version)}
    for name, content in contents.items():
        if before.get(name) != content:
            write_file(folder / name, content)
    for name in before.keys() - contents.keys():
        (folder / name).unlink()
    return before != contents
