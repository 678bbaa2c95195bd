# SPDX-License-Identifier: Apache-2.0
"""BASELINE=pristine: the fork with its switch unset against the release without our patches.

The release's Python files come from its tag in the fork's git and are unpacked under .workspace;
the compiled files, which git does not track, are linked in from the fork. The two
sides then differ in nothing but our patches.
"""

import shutil
import subprocess
from pathlib import Path

from workspace.bench.plan import Plan
from workspace.bench.variants import Variant
from workspace.errors import WorkspaceError
from workspace.paths import STATE
from workspace.release import tree as release_tree

TREE = STATE / "pristine"
TAG = "upstream"
IGNORED = ("ls-files", "--others", "--ignored", "--exclude-standard", "-z")
"""What git ignores is what the installation put there; a user's own new file is not."""


def sides(plan: Plan) -> tuple[Variant, Variant]:
    """(pristine, stock): neither runs kernels of ours."""
    source = release_tree()
    tree = make_tree(source, TREE / _tag(source).replace("/", "-"))
    return Variant("pristine", python_path=tree), Variant("stock")


def make_tree(source: Path, tree: Path) -> Path:
    """The release's files at `tree`, with the fork's untracked binaries linked in.

    Raises:
        WorkspaceError: git cannot write the tree.
    """
    partial = tree.with_name(f"{tree.name}.partial")
    for left in (tree, partial):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    # An archive instead of `git worktree`: nothing of it is left behind in the user's repository.
    archive = subprocess.Popen(
        ["git", "-C", str(source), "archive", _tag(source), "vllm"], stdout=subprocess.PIPE
    )
    unpacked = subprocess.run(["tar", "-x", "-C", str(partial)], stdin=archive.stdout, check=False)
    if archive.wait() != 0 or unpacked.returncode != 0:
        raise WorkspaceError(f"cannot unpack {_tag(source)} from {source}; run make doctor")
    for name in _git(source, *IGNORED, "vllm").split("\0"):
        if name and not name.endswith(".pyc"):
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source / name)
    partial.rename(tree)
    return tree


def _tag(source: Path) -> str:
    tags = _git(source, "tag", "--list", f"{TAG}/*", "--merged", "HEAD").split()
    if not tags:
        raise WorkspaceError(f"BASELINE=pristine: {source} has no tag {TAG}/…; run make dev")
    return tags[-1]


def _git(source: Path, *arguments: str) -> str:
    command = ["git", "-C", str(source), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise WorkspaceError(f"BASELINE=pristine: git in {source}: {done.stderr.strip()[:200]}")
    return done.stdout
