# SPDX-License-Identifier: Apache-2.0
"""Which verbs write, from which state each is started, and why the others are left out."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from tests.kills.scene import commit
from tests.workspace.conftest import BINARIES, NEW, OLD, Checkout
from workspace.environment import inventory
from workspace.host.paths import ROOT, lock_path

LEFT_OUT = {
    **dict.fromkeys(
        ("doctor", "ops", "predict", "compare", "inspect", "fork-status", "fork-diff", "snapshots"),
        "writes nothing but what is asked for, or caches of other packages",
    ),
    **dict.fromkeys(
        ("trace", "eval", "capture", "profile", "sanitize"),
        "needs an engine or a GPU; its record is written in one piece, as that of bench is",
    ),
    **dict.fromkeys(
        ("image", "container", "devcontainer", "shell", "snapshot", "snapshot-verify"),
        "needs a Docker engine; tests/container kills it",
    ),
    **dict.fromkeys(("watch", "notebook"), "runs until it is stopped"),
    **dict.fromkeys(("test", "lint"), "runs programs of others, which write what they write"),
    "upgrade": "its steps are other verbs, and each is remembered when it has ended",
    "wheel-verify": "makes an environment of its own and serves from it",
    "fork-build": "killed in tests/workspace/fork: it needs sources that git fetches",
    "unbundle": "killed in tests/workspace/bundle",
}
"""Verb → why it is not killed here."""


@dataclass(frozen=True)
class Case:
    """A verb and the state in which it is started.

    Args:
        verb: of the table.
        name: of the case.
        words: what is given to make; a program of Python, if there is a space in the first.
        prepare: what is done to the scene before.
        again: what ends it after the fault, if not the same command.
        done: what it may say instead of success where the fault came after the end.
        stops: what it says in its regular end, if that is an error.
        varies: begins of names of files whose content differs from run to run.
        edits: whether it is started with uncommitted edits in the fork's tree.
        slow: takes minutes; run on demand.
        quick: run by the tests, too.
    """

    verb: str
    name: str
    words: tuple[str, ...]
    prepare: Callable[[Checkout], None] = lambda _: None
    again: tuple[str, ...] = ()
    done: str = ""
    stops: str = ""
    varies: tuple[str, ...] = ()
    edits: bool = True
    slow: bool = False
    quick: bool = False

    def command(self, checkout: Checkout, words: tuple[str, ...] = ()) -> list[str]:
        words = words or self.words
        if " " in words[0]:
            python = checkout.root / ".venv" / "bin" / "python"
            return [str(python), "-P", "-c", f"import sys; sys.path.insert(0, '.')\n{words[0]}"]
        return ["make", "--no-print-directory", *words]


# --- states ---------------------------------------------------------------------------------------


def nothing_compiled(checkout: Checkout) -> None:
    shutil.rmtree(checkout.root / ".workspace" / "kernels")
    for name in ("compile_commands.json", ".workspace/clangd.cuh"):
        (checkout.root / name).unlink(missing_ok=True)


def without_the_other(checkout: Checkout) -> None:
    shutil.rmtree(checkout.tree(NEW))


def new_release(checkout: Checkout) -> None:
    without_the_other(checkout)
    nothing_compiled(checkout)


def no_binaries(checkout: Checkout) -> None:
    for name in BINARIES:
        (checkout.src / name).unlink()
    nothing_compiled(checkout)


def no_environment(checkout: Checkout) -> None:
    shutil.rmtree(checkout.root / ".venv")


def conflict(checkout: Checkout) -> None:
    """A commit that the other release has no place for."""
    without_the_other(checkout)
    commit(checkout, "vllm/kept.py", "third = 1\n", "Third")


def stopped(checkout: Checkout) -> None:
    conflict(checkout)
    result = checkout.make("fork-rebase", f"VERSION={NEW}")
    assert "conflicts in vllm/kept.py" in result.stdout, result.stdout


def resolved(checkout: Checkout) -> None:
    stopped(checkout)
    (checkout.src / "vllm/kept.py").write_text("both = True\n")
    checkout.git("add", "vllm/kept.py")


def model_there(checkout: Checkout) -> None:
    result = checkout.make("convert", "OUT=models/sparse", "PATTERN=6:8")
    assert result.returncode == 0, result.stdout


def host_inventory(checkout: Checkout) -> None:
    """A host that lacks nothing but what is ours: no package has to be fetched."""
    command = [sys.executable, inventory.__file__, "host.json"]
    subprocess.run(command, cwd=checkout.root, capture_output=True, check=True)


# --- programs -------------------------------------------------------------------------------------

RECORD = str(ROOT / "benchmarks/engine/tiny-qwen2-throughput-cpu.json")
SAVE = f"""\
from pathlib import Path
from workspace.bench import record, runner
from workspace.host.errors import reported_in_one_line
with reported_in_one_line():
    for name in ("first", "second", "third"):
        found = record.read(Path({RECORD!r}))
        runner.save(found.model_copy(update={{"run": name}}))
"""
TUNED = "kernels/custom_kernels/gemm/tuning/small.json"
TUNE = f"""\
import sys
from custom_kernels.command import exit_with
from custom_kernels.tuning.__main__ import main
record = {str(ROOT / "tests/kernels/data/gemm_h200_a.json")!r}
sys.argv[1:] = [record, "--output", {TUNED!r}]
exit_with(main)
"""
LOCK = f"""\
from pathlib import Path
from workspace.environment import lock
from workspace.host.errors import reported_in_one_line
lock.resolve = lambda pins, lines, start: Path({str(lock_path(OLD))!r}).read_text()
with reported_in_one_line():
    lock.run()
"""


CASES = (
    Case("dev", "dev of a new release", ("dev", f"VLLM_VERSION={NEW}"), new_release, edits=False),
    Case("dev", "dev without binaries", ("dev",), no_binaries),
    Case("dev", "dev without an environment", ("dev",), no_environment, slow=True),
    Case("kernels", "kernels", ("kernels",), nothing_compiled),
    Case("fork-export", "fork-export", ("fork-export",), quick=True),
    Case(
        "fork-rebase",
        "fork-rebase",
        ("fork-rebase", f"VERSION={NEW}"),
        without_the_other,
        done=f"is vLLM {NEW} already",
        edits=False,
    ),
    Case(
        "fork-rebase",
        "fork-rebase to a conflict",
        ("fork-rebase", f"VERSION={NEW}"),
        conflict,
        stops="conflicts in vllm/kept.py",
        edits=False,
    ),
    Case(
        "fork-rebase",
        "fork-rebase after a conflict",
        ("fork-rebase",),
        resolved,
        done="name the release",
        edits=False,
    ),
    Case(
        "fork-rebase",
        "fork-rebase ABORT=1",
        ("fork-rebase", "ABORT=1"),
        stopped,
        done="no rebase is in progress",
        edits=False,
    ),
    Case(
        "new-kernel",
        "new-kernel",
        ("new-kernel", "OP=gemm", "BACKEND=cupy", "NAME=mine"),
        done="exists; use another name",
    ),
    Case(
        "new-kernel",
        "new-kernel of an operation",
        ("new-kernel", "OP=mine", "BACKEND=cuda"),
        done="exists; use another name",
        quick=True,
    ),
    Case("inventory", "inventory", ("inventory",), varies=("inventory.json",)),
    Case("convert", "convert", ("convert", "OUT=models/sparse", "FORCE=1")),
    Case(
        "convert", "convert over a model", ("convert", "OUT=models/sparse", "FORCE=1"), model_there
    ),
    Case("report", "report", ("report",)),
    Case(
        "bundle",
        "bundle",
        ("bundle", "TARGET=host.json", "PARTS=100K"),
        host_inventory,
        varies=("bundle/",),
        slow=True,
    ),
    Case("wheel", "wheel", ("wheel", "OPS=gemm")),
    Case("clean", "clean", ("clean",), quick=True),
    Case("clean", "clean, then dev", ("clean",), again=("dev",), slow=True),
    Case("bench", "records of bench", (SAVE,)),
    Case(
        # What it says of where its entries come from grows with every run.
        "bench-kernels",
        "a tuning file of bench-kernels",
        (TUNE,),
        varies=(TUNED,),
    ),
    Case("lock", "lock, resolved already", (LOCK,)),
)


def commit_edits(checkout: Checkout) -> None:
    checkout.git("add", "--all")
    checkout.git("commit", "-q", "-m", "Edits")
