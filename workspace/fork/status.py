# SPDX-License-Identifier: Apache-2.0
"""`make fork-status`: release, patches, commits not exported, uncommitted edits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from workspace import verbs
from workspace.fork import patch_queue, rebase_state
from workspace.fork.tree_state import ForkState, branch, require, shown
from workspace.host.text import plural
from workspace.pins import release

MAX_ENTRIES = 10
"""Entries of a list in the text; JSON=1 has all of them."""


@dataclass(frozen=True)
class QueuedPatch:
    """A patch file; removed lines are upstream's."""

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
    patches = [(path.name, patch_queue.read_file(path)) for path in patch_queue.files(version)]
    return [QueuedPatch(name, *patch.lines, patch.binary) for name, patch in patches]


def status(tree: ForkState) -> Status:
    version = tree.version
    return Status(
        release=version,
        tree=shown(release.tree(version)),
        shown_by_src=release.active() == version,
        branch=branch(release.tree(version)),
        patches=queue(version),
        patches_applied=tree.patches_digest == patch_queue.digest(patch_queue.files(version)),
        own_commits=tree.own_commits,
        uncommitted=tree.uncommitted,
        rebase=rebase_state.summary(),
        other_releases=[other.name for other in release.trees() if other.name != version],
    )


def table(status: Status) -> Iterator[str]:
    link = ", linked as vllm-fork/src" if status.shown_by_src else ""
    yield f"release      vLLM {status.release}, branch {status.branch} in {status.tree}{link}"
    added = sum(patch.added for patch in status.patches)
    yield f"patches      {len(status.patches)}, {plural(added, 'line')} added"
    for patch in status.patches:
        removes = f"  removes {plural(patch.removed, 'upstream line')}" if patch.removed else ""
        binary = "  binary" if patch.binary else ""
        yield f"               {patch.name}  +{patch.added}{removes}{binary}"
    if not status.patches_applied:
        yield f"             vllm-fork/patches/{status.release} and the tree differ: make"
        yield "             fork-export writes your commits there, make dev applies its patches"
    yield from _section("commits", status.own_commits, "not exported: make fork-export")
    yield from _section("edits", status.uncommitted, "not committed")
    if status.rebase:
        yield f"rebase       {status.rebase}"
    if status.other_releases:
        yield f"also here    {', '.join(status.other_releases)} (make dev VLLM_VERSION=…)"


def _section(heading: str, entries: list[str], meaning: str) -> Iterator[str]:
    yield f"{heading:12} " + (f"{len(entries)} {meaning}" if entries else "none")
    for entry in entries[:MAX_ENTRIES]:
        yield f"               {entry}"
    if len(entries) > MAX_ENTRIES:
        yield f"               … and {len(entries) - MAX_ENTRIES} more"


def run(options: verbs.Report) -> int:
    """Print the status of the selected release's tree.

    Raises:
        WorkspaceError: there is no tree.
    """
    current = status(require())
    print(json.dumps(asdict(current), indent=2) if options.json else "\n".join(table(current)))
    return 0
