# SPDX-License-Identifier: Apache-2.0
"""`make fork-status`: release, patches, what is not exported, what is not committed.

Standard library only, and no lock: it looks and changes nothing, so it answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from workspace import verbs
from workspace.fork import patch_queue, rebase_state
from workspace.fork.tree_state import ForkState, branch, shown, state
from workspace.host.errors import WorkspaceError
from workspace.host.text import plural
from workspace.pins import release

MOST = 10
"""Entries of a list that are shown; JSON=1 has all of them."""


@dataclass(frozen=True)
class QueuedPatch:
    """One file of the queue; lines removed are upstream's."""

    name: str
    added: int
    removed: int
    binary: bool


@dataclass(frozen=True)
class Status:
    release: str
    tree: str
    shown_by_src: bool
    branch: str
    patches: list[QueuedPatch]
    patches_applied: bool
    own_commits: list[str]
    uncommitted: list[str]
    rebase: str | None
    other_releases: list[str]


def queue(version: str) -> list[QueuedPatch]:
    found = []
    for path in patch_queue.files(version):
        try:
            patch = patch_queue.from_file(path.read_bytes())
        except WorkspaceError as error:
            raise WorkspaceError(f"{shown(path)} is not a patch: {error}") from None
        binary = b"\nGIT binary patch\n" in patch.diff
        found.append(QueuedPatch(path.name, *patch.lines, binary))
    return found


def status(found: ForkState) -> Status:
    version = found.version
    return Status(
        release=version,
        tree=shown(release.tree(version)),
        shown_by_src=release.active() == version,
        branch=branch(release.tree(version)),
        patches=queue(version),
        patches_applied=found.patches_digest == patch_queue.digest(patch_queue.files(version)),
        own_commits=found.own_commits,
        uncommitted=found.uncommitted,
        rebase=rebase_state.summary(),
        other_releases=[tree.name for tree in release.trees() if tree.name != version],
    )


def table(found: Status) -> Iterator[str]:
    link = ", shown by vllm-fork/src" if found.shown_by_src else ""
    yield f"release      vLLM {found.release}, branch {found.branch} in {found.tree}{link}"
    added = sum(patch.added for patch in found.patches)
    yield f"patches      {len(found.patches)}, {plural(added, 'line')} added"
    for patch in found.patches:
        removes = f"  removes {plural(patch.removed, 'upstream line')}" if patch.removed else ""
        binary = "  binary" if patch.binary else ""
        yield f"               {patch.name}  +{patch.added}{removes}{binary}"
    if not found.patches_applied:
        yield f"             vllm-fork/patches/{found.release} is not what the tree was made from"
        yield "             (your commits into it: make fork-export; it into the tree: make dev)"
    yield f"commits      {_count(found.own_commits, 'not exported: make fork-export')}"
    yield from _listed(found.own_commits)
    yield f"edits        {_count(found.uncommitted, 'not committed')}"
    yield from _listed(found.uncommitted)
    if found.rebase:
        yield f"rebase       {found.rebase}"
    if found.other_releases:
        names = ", ".join(found.other_releases)
        yield f"also here    {names} (make dev VLLM_VERSION=…)"


def _count(entries: list[str], words: str) -> str:
    return f"{len(entries)} {words}" if entries else "none"


def _listed(entries: list[str]) -> Iterator[str]:
    for entry in entries[:MOST]:
        yield f"               {entry}"
    if len(entries) > MOST:
        yield f"               … and {len(entries) - MOST} more"


def run(options: verbs.ForkStatus) -> int:
    """Print the status of the selected release's tree.

    Raises:
        WorkspaceError: there is no tree.
    """
    found = state()
    if found is None:
        raise WorkspaceError(f"{shown(release.tree())} is not there; run: make dev")
    made = status(found)
    print(json.dumps(asdict(made), indent=2) if options.json else "\n".join(table(made)))
    return 0
