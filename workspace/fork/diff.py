# SPDX-License-Identifier: Apache-2.0
"""`make fork-diff`: everything in the tree that differs from the pristine release, as one diff,
including uncommitted edits and new files."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from workspace import verbs
from workspace.fork.tree_state import APPLIED, require
from workspace.host.git import git
from workspace.host.git import run as run_git
from workspace.host.text import plural, say
from workspace.pins import release


def run(options: verbs.ForkDiff) -> int:
    """Print the diff against the release, or (OWN=1) against the release with our patches.

    On a terminal with git's colours and pager, else as plain text for `git apply`.

    Raises:
        WorkspaceError: there is no tree.
    """
    version = require().version
    tree = release.tree(version)
    base = APPLIED if options.own else f"upstream/{version}"
    plain = ("--find-renames", "--no-ext-diff", "--no-textconv")
    command = ["diff", *plain, "--stat" if options.stat else "--binary", base, "--"]
    with tempfile.TemporaryDirectory() as work:
        # A copy of the index, to which new files are added: the user's index has what they staged.
        # With its time: git looks into a file only if it changed since, or in the same second.
        index = Path(work) / "index"
        shutil.copy2(tree / ".git" / "index", index)
        env = {"GIT_INDEX_FILE": str(index)}
        git("add", "--intent-to-add", "--all", ".", tree=tree, env=env)
        names = git("diff", "--name-only", "-z", base, "--", tree=tree, env=env).split("\0")[:-1]
        pager = "--paginate" if sys.stdout.isatty() else "--no-pager"
        result = run_git(pager, *command, tree=tree, env=env, check=False, capture=False)
    base_name = "with the patches applied" if options.own else "as released"
    count = plural(len(names), "file") if names else "nothing"
    say(f"different from vLLM {version} {base_name}: {count}")
    # A signal ends git if the reader of a pipe closed it.
    return result.returncode if result.returncode >= 0 else 128 - result.returncode
