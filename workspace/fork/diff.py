# SPDX-License-Identifier: Apache-2.0
"""`make fork-diff`: everything in the tree that is not the pristine release, as one diff.

Uncommitted edits and new files are part of it. Standard library only.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from workspace import verbs
from workspace.fork.tree_state import APPLIED, shown, state
from workspace.host.errors import WorkspaceError
from workspace.host.git import git
from workspace.host.git import run as run_git
from workspace.host.text import plural
from workspace.pins import release


def run(options: verbs.ForkDiff) -> int:
    """Print the diff against the release, or (OWN=1) against the release with our patches.

    On a terminal git's own colours and pager; elsewhere plain text that `git apply` takes.

    Raises:
        WorkspaceError: there is no tree.
    """
    found = state()
    if found is None:
        raise WorkspaceError(f"{shown(release.tree())} is not there; run: make dev")
    tree = release.tree(found.version)
    base = APPLIED if options.own else f"upstream/{found.version}"
    plain = ("--find-renames", "--no-ext-diff", "--no-textconv")
    command = ["diff", *plain, "--stat" if options.stat else "--binary", base, "--"]
    with tempfile.TemporaryDirectory() as work:
        # An index of our own, in which new files are known: the user's says what they staged.
        index = Path(work) / "index"
        shutil.copy(tree / ".git" / "index", index)
        env = {"GIT_INDEX_FILE": str(index)}
        git("add", "--intent-to-add", "--all", ".", tree=tree, env=env)
        names = git("diff", "--name-only", "-z", base, "--", tree=tree, env=env).split("\0")[:-1]
        pager = "--paginate" if sys.stdout.isatty() else "--no-pager"
        result = run_git(pager, *command, tree=tree, env=env, shown=True)
    like = "with the patches applied" if options.own else "as released"
    count = plural(len(names), "file") if names else "nothing"
    print(f"· different from vLLM {found.version} {like}: {count}", file=sys.stderr)
    # A signal ends git where nobody reads on.
    return result.returncode if result.returncode >= 0 else 128 - result.returncode
