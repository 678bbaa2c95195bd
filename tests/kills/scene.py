# SPDX-License-Identifier: Apache-2.0
"""A small checkout with work of a user in it, put back before each fault.

Its environments are this one's packages by a `.pth` file, with installations of their own on top:
made in a second, copied with the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError, safe_open

from tests.workspace.conftest import (
    BASE_PYTHON,
    NEW,
    OLD,
    Checkout,
    copy_checkout,
    make_template,
    pin_another_release,
)
from workspace.bundle import unbundle
from workspace.bundle.unbundle import UnbundleError
from workspace.environment import lock
from workspace.fork import patch_queue
from workspace.host.errors import WorkspaceError
from workspace.host.files import PARTIAL
from workspace.host.paths import BENCHMARKS, KERNELS, ROOT

UNFINISHED = re.compile(rf"{re.escape(PARTIAL)}|partial-|.*\.(partial|tmp|unfinished|lock)$")
"""Names that say of themselves that a file or folder is not whole."""
PASSING = {"__pycache__", "logs", ".git", "lock", "tools", "slots"}
"""What a run leaves that is not its result."""
MINE = (
    "notes.txt",
    ".clangd",
    "kernels/custom_kernels/gemm/own.py",
    "benchmarks/results/mine.json",
)
"""Files of the user, beside the fork's tree."""
RECORDS = ("engine/tiny-qwen2-throughput-cpu.json", "kernels/gemm-cublaslt-h100.json")
DATES = {f"GIT_{role}_DATE": "2026-01-01T00:00:00Z" for role in ("AUTHOR", "COMMITTER")}


@dataclass(frozen=True)
class Work:
    """What must not be lost."""

    files: dict[str, str]
    edits: dict[str, str]
    commits: frozenset[str]


def make_checkout(folder: Path) -> Checkout:
    """A checkout that is a git repository, both releases set up, with the user's work."""
    template = make_template(folder / "template")
    checkout = copy_checkout(template, folder / "scene")
    root = checkout.root
    pin_another_release(root, Path(checkout.env["WORKSPACE_CACHE"]))
    for path in (KERNELS / "custom_kernels").rglob("*.py"):  # what the verbs import
        target = root / "kernels" / path.relative_to(KERNELS)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name in RECORDS:
        (root / "benchmarks" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(BENCHMARKS / name, root / "benchmarks" / name)
    shutil.copy(ROOT / "LICENSE", root)
    (folder / "tmp").mkdir()
    checkout.env |= {
        # In the checkout, so that it shares the disk that gets full.
        "CUSTOM_KERNELS_CACHE": str(root / ".workspace" / "kernels"),
        # A compiler waits for the others of this user, which are found there.
        "TMPDIR": str(folder / "tmp"),
    }
    (folder / "gitconfig").write_text("[user]\nname = U\nemail = u@example.invalid\n")
    checkout.env |= {"GIT_CONFIG_GLOBAL": str(folder / "gitconfig"), **DATES}
    for words in (["init", "-qb", "main"], ["add", "--all"], ["commit", "-qm", "ours"]):
        subprocess.run(["git", *words], cwd=root, env=checkout.env, check=True)
    for version, name in ((NEW, f".venv-{NEW}"), (OLD, ".venv")):
        _environment(root, root / name, version)
        made = checkout.make("dev", f"VLLM_VERSION={version}")
        assert made.returncode == 0, made.stdout
    for number in (1, 2):
        commit(checkout, f"vllm/mine_{number}.py", f"x = {number}\n" * 50, f"Commit {number}")
    checkout.git("branch", "idea")
    checkout.git("commit", "-q", "--amend", "-m", "Commit 2, again")
    (checkout.src / "vllm/__init__.py").write_text("VALUE = 'mine'\n")
    (checkout.src / "vllm/not_added.py").write_text("mine = True\n")
    for name in MINE:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}\n" if name.endswith("json") else "# mine\n")
    return checkout


def _environment(root: Path, prefix: Path, version: str) -> None:
    """An environment that set-up takes for the lock's: its packages are those of this one."""
    subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", prefix], check=True)
    (site,) = prefix.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    digest = hashlib.sha256((root / "locks" / f"vllm-{version}.txt").read_bytes()).hexdigest()
    stamp = {"lock": digest, "python": BASE_PYTHON}
    (prefix / "workspace.json").write_text(json.dumps(stamp))


def commit(checkout: Checkout, name: str, text: str, message: str) -> None:
    (checkout.src / name).write_text(text)
    checkout.git("add", name)
    checkout.git("commit", "-q", "-m", message)


def copy(source: Path, target: Path) -> None:
    """A tree to where none is; programs, which nobody edits, by links."""

    def one(here: str, there: str) -> str:
        (os.link if "/tools/" in here else shutil.copy2)(here, there)
        return there

    shutil.copytree(source, target, symlinks=True, copy_function=one)


# --- the user's work ------------------------------------------------------------------------------


def digest(path: Path) -> str:
    if path.is_symlink():
        return f"-> {os.readlink(path)}"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "gone"


def git(tree: Path, *words: str) -> str:
    """Our own look at a tree, which takes no lock and leaves the index as it is."""
    command = ["git", "--no-optional-locks", *words]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout


def work(root: Path) -> Work:
    tree = root / "vllm-fork" / "releases" / OLD
    status = git(tree, "status", "--porcelain", "-z", "-uall", "--no-renames").split("\0")
    names = [entry[3:] for entry in status if entry]
    return Work(
        {name: digest(root / name) for name in MINE},
        {name: digest(tree / name) for name in names},
        frozenset(git(tree, "rev-list", "HEAD", "--branches").split()),
    )


def lost(root: Path, before: Work) -> Iterator[str]:
    """What of the user's work is not as it was."""
    tree = root / "vllm-fork" / "releases" / OLD
    if locks := [path.name for path in (tree / ".git").rglob("*.lock")]:
        yield f"{', '.join(locks)} keeps the user from committing"
    try:
        after = work(root)
    except (OSError, subprocess.CalledProcessError) as error:
        yield f"vllm-fork/releases/{OLD} is no repository any more: {error}"
        return
    for was, now in ((before.files, after.files), (before.edits, after.edits)):
        yield from (f"{name} is not as it was" for name in was if now.get(name) != was[name])
    if gone := before.commits - after.commits:
        yield f"{len(gone)} commits are on no branch"


# --- what a verb leaves ---------------------------------------------------------------------------


def results(root: Path) -> dict[str, str]:
    """Path → hash of every file, and of each repository's refs; environments are left out."""
    found: dict[str, str] = {}
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        if here != root and (here / ".git").is_dir():
            found[str(here.relative_to(root) / ".git")] = _history(here)
        folders[:] = [
            name for name in folders if name not in PASSING and not name.startswith(".venv")
        ]
        folders[:] = [name for name in folders if not name.endswith(".egg-info")]
        links = [name for name in folders if (here / name).is_symlink()]
        for name in {*files, *links} - PASSING:
            found[str((here / name).relative_to(root))] = digest(here / name)
    return found


def _history(tree: Path) -> str:
    """Branches with the content, author and message of each commit: not the committer's date."""
    try:
        refs = git(tree, "for-each-ref", "--format=%(refname)", "refs/heads", "refs/tags").split()
        logs = [git(tree, "log", "--format=%T %an %B", ref) for ref in refs]
        head = git(tree, "symbolic-ref", "-q", "HEAD")
    except subprocess.CalledProcessError:
        return "unfinished"
    return hashlib.sha256(repr((head, refs, logs)).encode()).hexdigest()


def unfinished(root: Path, name: str) -> bool:
    """Whether it says of itself, or the state file of a rebase says, that it is not whole."""
    rebasing = (root / ".workspace" / "rebase.json").exists()
    if rebasing and name.startswith(f"vllm-fork/releases/{NEW}/"):
        return True
    return any(UNFINISHED.match(part) for part in Path(name).parts)


def half(path: Path) -> bool:
    """Whether a file is cut off, for the kinds of which two runs do not write the same bytes."""
    content = path.read_bytes()
    try:
        match path.suffix:
            case ".json":
                json.loads(content)
            case ".toml":
                tomllib.loads(content.decode())
            case ".whl" | ".zip":
                return ZipFile(path).testzip() is not None
            case ".safetensors":
                safe_open(path, framework="pt")
            case ".patch":
                patch_queue.from_file(content)
            case ".png":
                return not content.endswith(b"IEND\xaeB`\x82")
            case ".html":
                return not content.rstrip().endswith(b"</html>")
            case ".so":
                read = subprocess.run(["nm", "-D", path], capture_output=True, check=False)
                return read.returncode != 0
            case "" if path.name.startswith("part-"):
                unbundle.check_parts(path.parent, unbundle.read_manifest(path.parent))
            case ".txt" if path.parent.name == "locks":
                lock.parse(content.decode())
            case _:
                return True
    except (ValueError, BadZipFile, SafetensorError, WorkspaceError, UnbundleError):
        return True
    return False
