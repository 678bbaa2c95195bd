# SPDX-License-Identifier: Apache-2.0
"""Commits as patch files, and patch files as commits: each is the inverse of the other.

A patch file is a mail as git knows it: author, date, subject, message, `---`, diff. The diff has no
context lines and no section headings, so it holds nothing of upstream's but lines it removes. Git
would put such a hunk wherever its line number points to, without a complaint; so each file must be,
byte for byte, the one whose hash the patch names.

What is kept of a commit: its changes (adds, deletes, renames, modes, binary files, any file name),
author, date and message. The committer becomes the author, so that the same patches on the same
release are the same commits everywhere.

Standard library only: `make fork-status` reads patches here without an environment.
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
from workspace.host.git import git, git_bytes
from workspace.host.paths import PATCHES, ROOT

ZEROS = "0" * 40
# Lines of a message that could be taken for what comes after it get a ">" in front, which is how
# mail boxes have always done it.
AMBIGUOUS = re.compile(rb"^(>*(?:---$|diff -|From ))", re.MULTILINE)
ESCAPED = re.compile(rb"^>(>*(?:---$|diff -|From ))", re.MULTILINE)
HUNK = re.compile(rb"^(@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@).*$", re.MULTILINE)
"""In a diff only a hunk's first line begins with @@: lines of a file have a sign before them."""
FULL_INDEX = re.compile(rb"^index [0-9a-f]{40}\.\.[0-9a-f]{40}", re.MULTILINE)


@dataclass(frozen=True)
class Patch:
    """A commit without its place in history; `diff` is empty for a commit that changes nothing."""

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


def files(version: str) -> list[Path]:
    """The patches of a release, in order."""
    return sorted((PATCHES / version).glob("*.patch"))


def digest(patches: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for path in patches:
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


# --- commits to patches ---------------------------------------------------------------------


def commits(tree: Path, base: str, tip: str) -> list[str]:
    """The commits after `base` up to `tip`, oldest first.

    Raises:
        WorkspaceError: `base` is not below `tip`, or there is a merge between them.
    """
    if git("merge-base", base, tip, tree=tree, check=False).strip() != commit_id(tree, base):
        raise WorkspaceError(
            f"{short(tree, tip)} in {shown(tree)} is not built on {base}, so it cannot be written "
            f"as patches; bring your commits onto it: git rebase --onto {base} <your first commit>^"
        )
    listed = git("log", "--reverse", "--format=%H %P", f"{base}..{tip}", tree=tree)
    found = [line.split() for line in listed.splitlines()]
    for one, *parents in found:
        if len(parents) > 1:
            raise WorkspaceError(
                f"{short(tree, one)} in {shown(tree)} is a merge, which a queue of patches cannot "
                f"hold; make the history straight: git rebase {base}"
            )
    return [one for one, *_ in found]


def read_commit(tree: Path, commit: str) -> Patch:
    form = "%an%x00%ae%x00%ad%x00%B"
    options = ["--encoding=UTF-8", "--date=rfc2822", f"--format={form}", "-s"]
    text = git_bytes("show", *options, commit, tree=tree)
    author, email, date, message = text.split(b"\0", 3)
    diff = git_bytes(
        "diff-tree", "-r", "-p", "-U0", "--root", "--no-commit-id", "--full-index", "--binary",
        "-M", "-l2000", "--diff-algorithm=myers", "--inter-hunk-context=0", "--no-color",
        "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/", commit, tree=tree,
    )  # fmt: skip
    return Patch(
        author.decode(errors="surrogateescape"),
        email.decode(errors="surrogateescape"),
        date.decode(),
        message.strip(b"\n") + b"\n",
        HUNK.sub(rb"\1", diff),
    )


def as_file(patch: Patch) -> bytes:
    """The patch as a mail."""
    # The subject is the message's first paragraph; further lines of it are folded, as in a mail.
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
    """The patch in a file; the inverse of `as_file`.

    Raises:
        WorkspaceError: it does not begin as a patch does.
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
    # git format-patch adds a table of changes and a signature, which say nothing new.
    start = diff.find(b"diff --git ")
    diff = re.sub(rb"\n-- \n[^\n]*\n*$", b"\n", diff[start:]) if start >= 0 else b""
    subject = fields["Subject"].removeprefix("[PATCH] ").encode(errors="surrogateescape")
    body = ESCAPED.sub(rb"\1", body[1:])
    message = subject + (b"\n\n" + body if body else b"") + b"\n"
    return Patch(sender[1], sender[2], fields["Date"], message, diff)


def file_name(number: int, patch: Patch) -> str:
    words = re.sub(r"[^a-z0-9._]+", "-", patch.subject.lower())[:60].strip("-.") or "patch"
    return f"{number:04d}-{words}.patch"


# --- patches to commits ---------------------------------------------------------------------


def commit_all(tree: Path, base: str, patches: Sequence[tuple[str, Patch]]) -> str:
    """Commit each (name, patch) on `base`, without touching the working tree; the last commit.

    Raises:
        WorkspaceError: names the patch, the file and the hunk that do not apply.
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
                    detail = str(error).rsplit(": error: ", 1)[-1].removeprefix("error: ")
                    raise WorkspaceError(
                        f"{name} does not apply: {detail}; {shown(tree)} is as it was. How to "
                        "bring a patch up to date: vllm-fork/README.md"
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
    named = []
    for path in paths:
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
        try:
            named.append((name, from_file(path.read_bytes())))
        except WorkspaceError as error:
            raise WorkspaceError(f"{name} is not a patch: {error}") from None
    return commit_all(tree, base, named)


def _apply(tree: Path, diff: bytes, index: dict[str, str], work: Path) -> None:
    sections = list(_sections(diff))
    listed = git_bytes("apply", "--numstat", "-z", "--unidiff-zero", tree=tree, stdin=diff)
    names = _numstat_names(listed)
    where = {
        name: f"{name} (hunk {hunk[1].decode()[3:-3].strip()})" if hunk else name
        for name, section in zip(names, sections, strict=False)
        for hunk in [HUNK.search(section)]
    }
    for name, section in zip(names, sections, strict=False):
        if HUNK.search(section) and not FULL_INDEX.search(section):
            raise WorkspaceError(
                f"{where[name]} has no full index line; make it with git diff --full-index"
            )
    before = _preimages(tree, diff, index, work, where)
    found = _blobs(tree, list(before), index)
    for name, blob in before.items():
        if found.get(name) != blob:
            is_now = found.get(name, "missing")[:12]
            raise WorkspaceError(
                f"{where.get(name, name)} is {is_now}, the patch was made for {blob[:12]}"
            )
    git("apply", "--cached", "--unidiff-zero", tree=tree, env=index, stdin=diff)


def _sections(diff: bytes) -> Iterator[bytes]:
    for section in (b"\n" + diff).split(b"\ndiff --git ")[1:]:
        yield b"diff --git " + section


def _numstat_names(listed: bytes) -> list[str]:
    """The name of each section's file, the new one of a renamed file."""
    words = listed.decode(errors="surrogateescape").split("\0")
    names, position = [], 0
    while position < len(words) - 1:
        _, _, name = words[position].split("\t", 2)
        if name:
            names.append(name)
            position += 1
        else:  # a rename: the old name, the new name
            names.append(words[position + 2])
            position += 3
    return names


def _preimages(
    tree: Path, diff: bytes, index: dict[str, str], work: Path, where: dict[str, str]
) -> dict[str, str]:
    """Old name → blob that the patch was made for, as git itself reads them out of the patch."""
    place = work / "before"
    place.unlink(missing_ok=True)
    command = ["apply", "--unidiff-zero", f"--build-fake-ancestor={place}"]
    try:
        git(*command, tree=tree, env=index, stdin=diff)
    except WorkspaceError as error:
        # The blob is not in the repository at all, so no file has it.
        named = re.search(r"useless \((.+)\)\.?$", str(error))
        if named:
            detail = where.get(named[1], named[1])
            raise WorkspaceError(f"{detail} is not the file that the patch was made for") from None
        raise
    return _blobs(tree, [], {"GIT_INDEX_FILE": str(place)})


def _blobs(tree: Path, names: list[str], index: dict[str, str]) -> dict[str, str]:
    """Name → blob in an index; without names, of all files in it."""
    listed = git("--literal-pathspecs", "ls-files", "-s", "-z", "--", *names, tree=tree, env=index)
    entries = [entry.split("\t", 1) for entry in listed.split("\0") if entry]
    return {name: fields.split()[1] for fields, name in entries}


def identity(name: str, email: str, date: str) -> dict[str, str]:
    """Environment that makes git write this author and committer."""
    return {
        f"GIT_{role}_{field}": value
        for role in ("AUTHOR", "COMMITTER")
        for field, value in (("NAME", name), ("EMAIL", email), ("DATE", date))
    }


def commit_id(tree: Path, name: str) -> str:
    return git("rev-parse", "-q", "--verify", f"{name}^{{commit}}", tree=tree).strip()


def short(tree: Path, commit: str) -> str:
    return git("log", "-1", "--format=%h (%s)", commit, tree=tree).strip()
