# SPDX-License-Identifier: Apache-2.0
"""The only module that runs git, so that its output is the same on every machine.

No setting of the user or the system affects it: configuration, attributes and ignore files, hooks,
templates, and GIT_ variables, such as those by which a surrounding hook names its repository. Of
the .git of a tree, which is the user's too, `info/exclude` counts, and those entries of `config`
that say how the tree is stored; SETTINGS override what would change the output.

So a file that only the user's global ignore file names is uncommitted work. It is in the tree: it
must not get lost with it, nor may a record call that tree clean.

The user's settings count where they commit (`committer`) and where something is fetched (`as_user`,
`fetching`). The git that users run in a tree themselves is not affected.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from workspace.host.errors import WorkspaceError
from workspace.host.files import require_writable
from workspace.host.text import last_line

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
"""What the .git/config of a tree must not change."""
NO_HOME = {
    # Not only GIT_CONFIG_GLOBAL: attributes and ignore files are found by these, too, and git
    # before 2.32 knows no other way.
    "HOME": os.devnull,
    "XDG_CONFIG_HOME": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_GRAFT_FILE": f"{os.devnull}/none",  # git warns of an existing file, even an empty one
    # `git status` would lock the index to refresh it: after a kill, the user could not commit.
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",
}
REPOSITORY_VARIABLES = (
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
    """The output of git in `tree`; without `check`, a failure gives an empty string.

    The other arguments are those of `run`.
    """
    result = run(*arguments, tree=tree, env=env, stdin=stdin, check=check)
    return "" if result.returncode else result.stdout.decode(errors="surrogateescape")


def run(
    *arguments: str,
    tree: Path,
    env: dict[str, str] | None = None,
    stdin: bytes | None = None,
    check: bool = True,
    capture: bool = True,
    pass_fds: tuple[int, ...] = (),
) -> subprocess.CompletedProcess[bytes]:
    """Run git in `tree`, the top of a repository.

    Args:
        arguments: without `git` itself.
        tree: no folder above it is searched for a repository.
        env: variables for this call, e.g. GIT_INDEX_FILE.
        stdin: its standard input.
        check: raise when it fails.
        capture: return its output instead of printing it.
        pass_fds: file descriptors that it inherits.

    Raises:
        WorkspaceError: git is missing or failed; the message ends with the last line of git's.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    top = {"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)}
    settings = [word for setting in SETTINGS for word in ("-c", setting)]
    try:
        result = subprocess.run(
            ["git", *settings, "-c", f"safe.directory={tree.resolve()}", *arguments],
            cwd=tree,
            env=inherited | NO_HOME | top | (env or {}),
            input=stdin,
            capture_output=capture,
            pass_fds=pass_fds,
            check=False,
        )
    except FileNotFoundError:
        if tree.is_dir():
            raise WorkspaceError("git is missing; install it, e.g. apt-get install git") from None
        raise WorkspaceError(f"git in {tree}: no such folder") from None
    if check and result.returncode:
        command = next(word for word in arguments if word[0] != "-" and "=" not in word)
        reason = last_line(result.stderr.decode(errors="replace"))
        if re.search("could(n't| not)|cannot|unable to", reason):
            require_writable(tree)  # git does not always say that the disk is full
        raise WorkspaceError(f"git {command} failed in {tree}: {reason}")
    return result


def clear_repository_variables() -> None:
    """Keep programs that we start (cmake, pip) from working on the repository of a hook."""
    for name in REPOSITORY_VARIABLES:
        os.environ.pop(name, None)


def as_user(*arguments: str, tree: Path, timeout: float | None = None) -> str:
    """The output of git with the user's settings in `tree`, never prompting; empty on failure."""
    silent = {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "true",
        "GIT_SSH_COMMAND": "ssh -oBatchMode=yes",
    }
    kept = {name: value for name, value in os.environ.items() if name not in REPOSITORY_VARIABLES}
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
    """Variables for a program that fetches with the user's git: proxies and rewrites count, and
    files arrive unchanged."""
    first = int(os.environ.get("GIT_CONFIG_COUNT") or 0)
    variables = {"GIT_CONFIG_COUNT": str(first + len(SETTINGS)), "GIT_ATTR_NOSYSTEM": "1"}
    for number, setting in enumerate(SETTINGS, first):
        name, value = setting.split("=", 1)
        variables |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    return variables


def committer(tree: Path) -> dict[str, str]:
    """Variables that make the user the committer, or a stand-in where git knows no name."""
    # Without useConfigOnly git makes a name up from the machine's.
    known = as_user("-c", "user.useConfigOnly=true", "var", "GIT_COMMITTER_IDENT", tree=tree)
    found = re.fullmatch(r"(.*) <(.*)> \d+ [-+]\d+\n", known, re.DOTALL)
    name, email = found.groups() if found else ("vllm-kernels", "rebase@invalid")
    return {"GIT_COMMITTER_NAME": name, "GIT_COMMITTER_EMAIL": email}
