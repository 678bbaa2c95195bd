# SPDX-License-Identifier: Apache-2.0
"""Commits as patch files, and patch files as commits: each is the inverse of the other.

A patch file is a mail in git's format: author, date, subject, message, `---`, diff. The diff has no
context lines and no section headings, so the only upstream code in it are removed lines. git would
put such a hunk wherever its line number points to, without an error; so each file must be, byte for
byte, the one whose hash is in the patch.

A patch keeps the changes of a commit (adds, deletes, renames, modes, binary files, any file name),
author, date and message. The committer becomes the author, so that the same patches on the same
release are the same commits everywhere.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.fork.tree_state import shown
from workspace.host.errors import WorkspaceError
from workspace.host.files import require_writable
from workspace.host.git import git
from workspace.host.git import run as run_git
from workspace.host.paths import PATCHES

ZEROS = "0" * 40
# Lines of a message that look like the start of the diff are escaped with ">", as in mail boxes.
AMBIGUOUS = re.compile(rb"^(>*(?:---$|diff -|From ))", re.MULTILINE)
ESCAPED = re.compile(rb"^>(>*(?:---$|diff -|From ))", re.MULTILINE)
HUNK = re.compile(rb"^(@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@).*$", re.MULTILINE)
"""In a diff only a hunk's first line begins with @@: lines of a file have a sign before them."""
FULL_INDEX = re.compile(rb"^index [0-9a-f]{40}\.\.[0-9a-f]{40}", re.MULTILINE)


@dataclass(frozen=True)
class Patch:
    """A commit without its parents; `diff` is empty for a commit that changes nothing."""

    author: str
    email: str
    date: str
    message: bytes
    diff: bytes

    @property
    def subject(self) -> str:
        return self.message.decode(errors="replace").strip().partition("\n")[0]

    @property
    def lines(self) -> tuple[int, int]:
        """Lines added, and lines removed, which are upstream's."""
        removed = sum(int(m[3] or 1) for m in HUNK.finditer(self.diff))
        return sum(int(m[5] or 1) for m in HUNK.finditer(self.diff)), removed

    @property
    def binary(self) -> bool:
        return b"\nGIT binary patch\n" in self.diff


def files(version: str) -> list[Path]:
    """The patches of a release, in order."""
    return sorted((PATCHES / version).glob("*.patch"))


def digest(patches: Sequence[Path]) -> str:
    sha256 = hashlib.sha256()
    for path in patches:
        sha256.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return sha256.hexdigest()


# --- commits to patches ---------------------------------------------------------------------


def commits(tree: Path, base: str, tip: str) -> list[str]:
    """The commits after `base` up to `tip`, oldest first.

    Raises:
        WorkspaceError: `base` is not an ancestor of `tip`, or there is a merge between them.
    """
    if not is_ancestor(tree, commit_id(tree, base), tip):
        raise WorkspaceError(
            f"{short(tree, tip)} in {shown(tree)} is not based on {base}, so it cannot be written "
            f"as patches; move your commits there: git rebase --onto {base} <your first commit>^"
        )
    listed = git("log", "--reverse", "--format=%H %P", f"{base}..{tip}", tree=tree)
    history = [line.split() for line in listed.splitlines()]
    for commit, *parents in history:
        if len(parents) > 1:
            raise WorkspaceError(
                f"{short(tree, commit)} in {shown(tree)} is a merge, which patches cannot "
                f"represent; linearize the history: git rebase {base}"
            )
    return [commit for commit, *_ in history]


def read_commit(tree: Path, commit: str) -> Patch:
    form = "%an%x00%ae%x00%ad%x00%B"
    options = ["--encoding=UTF-8", "--date=rfc2822", f"--format={form}", "-s"]
    text = run_git("show", *options, commit, tree=tree).stdout
    author, email, date, message = text.split(b"\0", 3)
    diff = run_git(
        "diff-tree", "-r", "-p", "-U0", "--root", "--no-commit-id", "--full-index", "--binary",
        "-M", "-l2000", "--diff-algorithm=myers", "--inter-hunk-context=0", "--no-color",
        "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/", commit, tree=tree,
    ).stdout  # fmt: skip
    return Patch(
        author.decode(errors="surrogateescape"),
        email.decode(errors="surrogateescape"),
        date.decode(),
        message.strip(b"\n") + b"\n",
        HUNK.sub(rb"\1", diff),
    )


def as_file(patch: Patch) -> bytes:
    """The patch as a mail."""
    # The subject is the first paragraph of the message; its further lines are folded.
    subject, gap, body = patch.message.rstrip(b"\n").partition(b"\n\n")
    head = (
        f"From {ZEROS} Mon Sep 17 00:00:00 2001\n"
        f"From: {patch.author} <{patch.email}>\n"
        f"Date: {patch.date}\n"
    ).encode(errors="surrogateescape")
    head += b"Subject: [PATCH] " + subject.replace(b"\n", b"\n ") + b"\n"
    body = AMBIGUOUS.sub(rb">\1", body) + b"\n" if gap else b""
    return head + b"\n" + body + b"---\n" + patch.diff


def from_file(content: bytes) -> Patch:
    """The patch in the content of a file; the inverse of `as_file`.

    Raises:
        WorkspaceError: it does not have the header of a patch.
    """
    head, _, rest = content.partition(b"\n\n")
    fields: dict[str, str] = {}
    name = ""
    for line in head.split(b"\n")[1:]:
        text = line.decode(errors="surrogateescape")
        if text.startswith(" ") and name:
            fields[name] += "\n" + text[1:]
        else:
            name, _, value = text.partition(": ")
            fields[name] = value
    sender = re.fullmatch(r"(.*) <(.*)>", fields.get("From", ""), re.DOTALL)
    if not head.startswith(b"From ") or not sender or not {"Date", "Subject"} <= set(fields):
        raise WorkspaceError("it does not begin with From, Date and Subject, as git format-patch's")
    body, _, diff = (b"\n" + rest).partition(b"\n---\n")
    # git format-patch adds a table of changes and a signature: redundant.
    start = diff.find(b"diff --git ")
    diff = re.sub(rb"\n-- \n[^\n]*\n*$", b"\n", diff[start:]) if start >= 0 else b""
    subject = fields["Subject"].removeprefix("[PATCH] ").encode(errors="surrogateescape")
    body = ESCAPED.sub(rb"\1", body[1:])
    message = subject + (b"\n\n" + body if body else b"") + b"\n"
    return Patch(sender[1], sender[2], fields["Date"], message, diff)


def read_file(path: Path) -> Patch:
    """`from_file` of a file, which an error names."""
    try:
        return from_file(path.read_bytes())
    except WorkspaceError as error:
        raise WorkspaceError(f"{shown(path)} is not a patch: {error}") from None


def file_name(number: int, patch: Patch) -> str:
    words = re.sub(r"[^a-z0-9._]+", "-", patch.subject.lower())[:60].strip("-.") or "patch"
    return f"{number:04d}-{words}.patch"


# --- patches to commits ---------------------------------------------------------------------


def commit_all(tree: Path, base: str, patches: Sequence[tuple[str, Patch]]) -> str:
    """Commit each (name, patch) on `base`, without changing the working tree.

    Returns:
        The last commit.

    Raises:
        WorkspaceError: a patch does not apply; names the patch, the file and the hunk.
    """
    with tempfile.TemporaryDirectory() as work:
        index = {"GIT_INDEX_FILE": str(Path(work) / "index")}
        git("read-tree", base, tree=tree, env=index)
        tip = commit_id(tree, base)
        for name, patch in patches:
            if patch.diff:
                try:
                    _apply(tree, patch.diff, index, Path(work))
                except WorkspaceError as error:
                    require_writable(tree / ".git")  # else the patch is not to blame
                    detail = str(error).rsplit(": error: ", 1)[-1].removeprefix("error: ")
                    raise WorkspaceError(
                        f"{name} does not apply: {detail}; {shown(tree)} is unchanged. How to "
                        "update a patch: vllm-fork/README.md"
                    ) from None
            written = git("write-tree", tree=tree, env=index).strip()
            tip = git(
                "commit-tree", written, "-p", tip,
                tree=tree, env=identity(patch.author, patch.email, patch.date),
                stdin=patch.message,
            ).strip()  # fmt: skip
        return tip


def commit_files(tree: Path, base: str, paths: Sequence[Path]) -> str:
    """`commit_all` for patch files."""
    return commit_all(tree, base, [(shown(path), read_file(path)) for path in paths])


def _apply(tree: Path, diff: bytes, index: dict[str, str], work: Path) -> None:
    """Apply a diff to an index, if each file is the one for which the diff was made."""
    where = {}  # name → name and first hunk
    sections = (b"\n" + diff).split(b"\ndiff --git ")[1:]
    for name, section in zip(_names(tree, diff), sections, strict=False):
        hunk = HUNK.search(section)
        where[name] = f"{name} (hunk {hunk[1].decode()[3:-3].strip()})" if hunk else name
        if hunk and not FULL_INDEX.search(section):
            raise WorkspaceError(
                f"{where[name]} has no full index line; create it with git diff --full-index"
            )
    expected = _preimages(tree, diff, index, work, where)
    actual = _blobs(tree, list(expected), index)
    for name, blob in expected.items():
        if actual.get(name) != blob:
            raise WorkspaceError(
                f"{where.get(name, name)} is {actual.get(name, 'missing')[:12]}, the patch was "
                f"made for {blob[:12]}"
            )
    git("apply", "--cached", "--unidiff-zero", tree=tree, env=index, stdin=diff)


def _names(tree: Path, diff: bytes) -> Iterator[str]:
    """The files of a diff in order, of a renamed file the new name."""
    listed = git("apply", "--numstat", "-z", "--unidiff-zero", tree=tree, stdin=diff)
    entries = iter(listed.split("\0")[:-1])
    for entry in entries:
        name = entry.split("\t", 2)[2]
        if not name:  # a rename: the next entries are the old name and the new name
            next(entries)
            name = next(entries)
        yield name


def _preimages(
    tree: Path, diff: bytes, index: dict[str, str], work: Path, where: dict[str, str]
) -> dict[str, str]:
    """Old name → blob for which the patch was made, read from the patch by git."""
    ancestor = work / "before"
    ancestor.unlink(missing_ok=True)
    command = ["apply", "--unidiff-zero", f"--build-fake-ancestor={ancestor}"]
    try:
        git(*command, tree=tree, env=index, stdin=diff)
    except WorkspaceError as error:
        # The blob is not in the repository, so no file has it.
        name = re.search(r"useless \((.+)\)\.?$", str(error))
        if name:
            detail = where.get(name[1], name[1])
            raise WorkspaceError(f"{detail} is not the file that the patch was made for") from None
        raise
    return _blobs(tree, [], {"GIT_INDEX_FILE": str(ancestor)})


def _blobs(tree: Path, names: list[str], index: dict[str, str]) -> dict[str, str]:
    """Name → blob in an index; without names, of all its files."""
    listed = git("--literal-pathspecs", "ls-files", "-s", "-z", "--", *names, tree=tree, env=index)
    entries = [entry.split("\t", 1) for entry in listed.split("\0") if entry]
    return {name: fields.split()[1] for fields, name in entries}


def identity(name: str, email: str, date: str) -> dict[str, str]:
    """Variables that make git write this author and committer."""
    return {
        f"GIT_{role}_{field}": value
        for role in ("AUTHOR", "COMMITTER")
        for field, value in (("NAME", name), ("EMAIL", email), ("DATE", date))
    }


def is_ancestor(tree: Path, commit: str, tip: str) -> bool:
    return git("merge-base", commit, tip, tree=tree, check=False).strip() == commit


def commit_id(tree: Path, name: str) -> str:
    return git("rev-parse", "-q", "--verify", f"{name}^{{commit}}", tree=tree).strip()


def subject(tree: Path, commit: str) -> str:
    return git("log", "-1", "--format=%s", commit, tree=tree).strip()


def short(tree: Path, commit: str) -> str:
    return git("log", "-1", "--format=%h (%s)", commit, tree=tree).strip()
