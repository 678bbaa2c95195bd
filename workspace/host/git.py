# SPDX-License-Identifier: Apache-2.0
"""The only module that runs git, so that its output is the same on every machine.

No setting of the user's or the system's affects it: configuration, attributes and ignore files,
hooks, templates, and GIT_ variables, such as those of a surrounding hook that name its repository.
Of a tree's own .git, which is the user's too, `info/exclude` counts, and of `config` what says how
the tree is stored; SETTINGS override what would change the output.

A file that only the user's own ignore file names is therefore uncommitted work here. It is in the
tree: it must not get lost with it, nor may a record call that tree clean.

The user's own settings are asked for where they commit (`committer`) and where something is fetched
(`as_user`, `fetching`). The git they run in a tree themselves stays as they set it up.

Standard library only: `make clean` needs git when there is no environment.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from workspace.host.errors import WorkspaceError

SETTINGS = (
    "core.hooksPath=/dev/null", "core.attributesFile=/dev/null", "core.excludesFile=/dev/null",
    "core.autocrlf=false", "core.safecrlf=false", "core.eol=lf", "core.fsmonitor=false",
    "core.quotePath=true", "commit.gpgSign=false", "tag.gpgSign=false", "gc.auto=0",
    "i18n.commitEncoding=UTF-8", "i18n.logOutputEncoding=UTF-8", "log.showSignature=false",
    "diff.noprefix=false", "diff.mnemonicPrefix=false", "diff.relative=false",
    "diff.renames=true", "diff.context=3", "diff.interHunkContext=0", "diff.algorithm=myers",
    "diff.orderFile=/dev/null", "diff.suppressBlankEmpty=false", "color.diff=auto",
    "apply.whitespace=nowarn", "apply.ignoreWhitespace=no", "submodule.recurse=false",
    "merge.conflictStyle=merge", "merge.renormalize=false", "rerere.enabled=false",
    "rebase.autoStash=false", "rebase.updateRefs=false", "rebase.missingCommitsCheck=ignore",
)  # fmt: skip
"""What a tree's own .git/config must not change."""
NO_HOME = {
    # Not only GIT_CONFIG_GLOBAL: attributes and ignore files are found by these, too, and git
    # before 2.32 knows no other way.
    "HOME": os.devnull,
    "XDG_CONFIG_HOME": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_GRAFT_FILE": f"{os.devnull}/none",  # one that is there, be it empty, is warned of
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",
}
SURROUNDINGS = (
    "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_NAMESPACE",
    "GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_QUARANTINE_PATH",
    "GIT_SHALLOW_FILE", "GIT_GRAFT_FILE", "GIT_CONFIG", "GIT_IMPLICIT_WORK_TREE",
    "GIT_REPLACE_REF_BASE", "GIT_INTERNAL_SUPER_PREFIX",
)  # fmt: skip
"""By these git tells a hook which repository it is about."""


def git(
    *arguments: str,
    tree: Path,
    env: dict[str, str] | None = None,
    stdin: bytes | None = None,
    check: bool = True,
) -> str:
    """Run git in `tree`, the top of a repository, and return what it prints.

    Args:
        arguments: without `git` itself.
        tree: no folder above it is searched for a repository.
        env: variables for this call, e.g. GIT_INDEX_FILE.
        stdin: its standard input.
        check: without it, a failure is an empty answer.

    Raises:
        WorkspaceError: git is missing or failed; the message ends with git's own last line.
    """
    output = git_bytes(*arguments, tree=tree, env=env, stdin=stdin, check=check)
    return output.decode(errors="surrogateescape")


def git_bytes(
    *arguments: str,
    tree: Path,
    env: dict[str, str] | None = None,
    stdin: bytes | None = None,
    check: bool = True,
) -> bytes:
    """`git`, for output that is not text."""
    result = run(*arguments, tree=tree, env=env, stdin=stdin)
    if check and result.returncode:
        complaint = result.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        verb = next(word for word in arguments if word[0] != "-" and "=" not in word)
        raise WorkspaceError(f"git {verb} in {tree}: {complaint[-1]}")
    return result.stdout if not result.returncode else b""


def run(
    *arguments: str,
    tree: Path,
    env: dict[str, str] | None = None,
    stdin: bytes | None = None,
    shown: bool = False,
    pass_fds: tuple[int, ...] = (),
) -> subprocess.CompletedProcess[bytes]:
    """`git` whatever its exit status; `shown`: it prints to our own output instead of to us."""
    settings = [word for one in SETTINGS for word in ("-c", one)]
    try:
        return subprocess.run(
            ["git", *settings, "-c", f"safe.directory={tree.resolve()}", *arguments],
            cwd=tree,
            env=environment(tree) | (env or {}),
            input=stdin,
            capture_output=not shown,
            pass_fds=pass_fds,
            check=False,
        )
    except FileNotFoundError:
        if tree.is_dir():
            raise WorkspaceError("git is missing; install it, e.g. apt-get install git") from None
        raise WorkspaceError(f"git in {tree}: there is no such folder") from None


def environment(tree: Path) -> dict[str, str]:
    """Of ours, without what leads git to another repository or to somebody's settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return clean | NO_HOME | {"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)}


def forget_surroundings() -> None:
    """Let no program that we start (cmake, pip) take a hook's repository for its own."""
    for name in SURROUNDINGS:
        os.environ.pop(name, None)


def as_user(*arguments: str, tree: Path, timeout: float | None = None) -> str:
    """What git as the user has it set up prints in `tree`, never asking; empty where it fails."""
    silent = {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "true",
        "GIT_SSH_COMMAND": "ssh -oBatchMode=yes",
    }
    kept = {name: value for name, value in os.environ.items() if name not in SURROUNDINGS}
    try:
        result = subprocess.run(
            ["git", "-c", f"safe.directory={tree.resolve()}", *arguments],
            cwd=tree,
            env=kept | silent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ""
    return result.stdout.decode(errors="surrogateescape") if result.returncode == 0 else ""


def fetching() -> dict[str, str]:
    """Variables for a program that fetches with the user's git, whose proxies and rewrites count:
    what it fetches arrives as it is in the repository."""
    first = int(os.environ.get("GIT_CONFIG_COUNT") or 0)
    found = {"GIT_CONFIG_COUNT": str(first + len(SETTINGS)), "GIT_ATTR_NOSYSTEM": "1"}
    for number, setting in enumerate(SETTINGS, first):
        name, value = setting.split("=", 1)
        found |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    return found


def committer(tree: Path) -> dict[str, str]:
    """Variables that make the user the committer, as their own git would; a stand-in where they
    gave git no name."""
    # Without useConfigOnly git makes a name up from the machine's.
    known = as_user("-c", "user.useConfigOnly=true", "var", "GIT_COMMITTER_IDENT", tree=tree)
    found = re.fullmatch(r"(.*) <(.*)> \d+ [-+]\d+\n", known, re.DOTALL)
    name, email = found.groups() if found else ("vllm-kernels", "rebase@invalid")
    return {"GIT_COMMITTER_NAME": name, "GIT_COMMITTER_EMAIL": email}


def version() -> str:
    """git's own line about itself."""
    return subprocess.run(["git", "--version"], capture_output=True, text=True, check=False).stdout
