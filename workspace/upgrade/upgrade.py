# SPDX-License-Identifier: Apache-2.0
"""`make upgrade`: our commits on another vLLM release, set up beside the old one and tried.

Steps: look the release up, rebase and export, compare the locks, look for the names of vLLM that
our files use, compile the kernels, run a short bench, doctor and the kernels' tests; then a table,
the same in a file, and an exit status that says whether the release can become the default one.
What a release without binaries for this machine leaves to prove is proven, and the rest is skipped.

The old release's tree, lock and environment are only read, and vllm-fork/src points at it in the
end, unless git waits there for the user to resolve a conflict.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from packaging.version import Version
from pypi_simple import DistributionPackage

from workspace import verbs
from workspace.environment import lock
from workspace.environment.fetch import fetch, listing
from workspace.fork import conflict, patch_queue, prepare, rebase, rebase_state
from workspace.host import setup_lock
from workspace.host.errors import WorkspaceError
from workspace.host.git import git
from workspace.host.paths import lock_files, lock_path
from workspace.host.settings import device
from workspace.host.text import plural, say, some
from workspace.pins import release
from workspace.pins.model import load
from workspace.upgrade import default, names, report
from workspace.upgrade.steps import Step, Steps, reason, verb

BENCH = {
    "INPUT_LEN": "32", "OUTPUT_LEN": "16", "NUM_PROMPTS": "8", "REPEATS": "1", "ROUNDS": "2",
}  # fmt: skip
"""Enough to prove which kernels ran and that outputs agree; nothing is said of speed."""
TESTS = (
    "test_gemm.py", "test_quant_expand.py", "test_sparse_gemm.py",
    "test_vllm.py::test_patterns_choose_the_layers_and_leave_no_name_in_the_graph",
    "test_vllm.py::test_the_hook_is_one_op_and_a_wrong_backend_one_line",
)  # fmt: skip
"""Of tests/kernels: the operations, and the way into vLLM."""
NEED_AN_ENGINE = ("vLLM", "binaries")
"""Rows of doctor that say what is missing without binaries for this machine."""


def run(options: verbs.Upgrade) -> int:
    """Upgrade to VERSION=, or go on with an upgrade that a conflict or a kill ended.

    Returns:
        0 if the release can become the default one.
    """
    stopped = rebase_state.read()
    origin = release.selected()
    target = stopped.target if stopped else options.version or "latest"
    if target == "latest":
        target = newest(listing("vllm"))
    if stopped and options.version not in (None, target):
        raise WorkspaceError(f"a rebase is in progress {rebase_state.summary()}")
    if target == origin:
        raise WorkspaceError(f"vLLM {target} is in use already; name another release: VERSION=")
    say(f"upgrading from vLLM {origin} to {target}")
    steps, start = Steps(target), time.monotonic()
    carried = _carry(origin, target)
    setup_lock.release()  # the steps from here on are verbs of their own
    steps.done.append(replace(carried, seconds=time.monotonic() - start))
    if carried.status == "ok":
        _prove(origin, steps)
    path = report.write(origin, steps)
    report.show(origin, steps, path)
    steps.end()
    if steps.passed and options.default:
        setup_lock.take("upgrade")
        default.make(target)
        say(f"the default release is vLLM {target} now; see git diff, and run: make dev")
    return 0 if steps.passed else 1


def newest(files: list[DistributionPackage]) -> str:
    """The newest release with an sdist among these files."""
    sources = [file for file in files if file.package_type == "sdist" and not file.is_yanked]
    versions = [file.version for file in sources if file.version]
    return max((one for one in versions if not Version(one).is_prerelease), key=Version)


# --- the patches ----------------------------------------------------------------------------------


def _carry(origin: str, target: str) -> Step:
    """Rebase what the new tree does not have yet, and export it as the patches of the release.

    Raises:
        WorkspaceError: it could not begin; a conflict is what came of the step.
    """
    stopped = rebase_state.read()
    before = origin if stopped else release.active()
    if stopped or not _subjects(origin) <= _subjects(target):
        try:
            rebase.run(verbs.ForkRebase(target))
        except WorkspaceError as error:
            state = rebase_state.read()
            if not (state and rebase_state.in_git(state.tree)):
                raise
            head = git("rev-parse", "-q", "--verify", "REBASE_HEAD", tree=state.tree, check=False)
            places = conflict.places(state, head.strip()) if head else ""
            text = str(error).partition("; ")[0]
            return Step("patches", "failed", text, tuple(places.splitlines()))
    if before and release.active() != before:
        release.activate(before)
        say(f"vllm-fork/src points at vLLM {before} again")
    if not release.tree(target).exists():
        pinned = load().release(target)
        patches = patch_queue.files(target)
        prepare.create(target, fetch(pinned.sdist), pinned.tree, patches)
    if not lock_path(target).exists():  # a run was killed before it was resolved
        lock.run(only=target)
    setup_lock.release()
    status, output = verb(target, "fork-export")
    if status:
        return Step("patches", "failed", reason(output))
    files = patch_queue.files(target)
    added = sum(patch_queue.read_file(path).lines[0] for path in files)
    text = f"{plural(len(files), 'patch')} without a conflict, {plural(added, 'line')} added"
    return Step("patches", "ok", text, tuple(path.name for path in files))


def _subjects(version: str) -> set[str]:
    """The subjects of the commits on top of a release; without a tree, of its patches."""
    tree = release.tree(version)
    if not tree.exists():
        return {patch_queue.read_file(path).subject for path in patch_queue.files(version)}
    listed = git("log", "--format=%s", f"{prepare.upstream_tag(version)}..HEAD", tree=tree)
    return set(listed.splitlines())


# --- the proofs -----------------------------------------------------------------------------------


def _prove(origin: str, steps: Steps) -> None:
    """The steps after the patches; those of a run that was killed are taken over."""
    target = steps.target
    head = git("rev-parse", "HEAD", tree=release.tree(target)).strip()
    content = b"".join(path.read_bytes() for path in lock_files(target, device()))
    steps.resume(hashlib.sha256(head.encode() + content).hexdigest())
    without = _no_engine(target)
    proofs: dict[str, Callable[[], Step]] = {
        "packages": partial(_packages, origin, target),
        "names": partial(_names, target),
        "kernels": partial(_kernels, target),
        "bench": partial(_bench, target),
        "doctor": partial(_doctor, target, engine=not without),
        "tests": partial(_tests, target),
    }
    for name, proof in proofs.items():
        skipped = partial(Step, name, "skipped", without)
        steps.do(name, skipped if without and name == "bench" else proof)


def _no_engine(target: str) -> str:
    """Why there is no engine for this machine, empty if there is one."""
    try:
        load().release(target).binary(device())
    except WorkspaceError as error:
        return str(error).partition(";")[0]
    return ""


def _packages(origin: str, target: str) -> Step:
    """What differs between the locks; resolving it was part of the rebase."""
    old, new = (lock.locked(lock_files(version, device())) for version in (origin, target))
    moved = [
        f"{name} {old[name].version} → {new[name].version}"
        for name in sorted(old.keys() & new.keys())
        if old[name].version != new[name].version
    ]
    added = [f"{name} {new[name].version} is new" for name in sorted(new.keys() - old.keys())]
    gone = [f"{name} {old[name].version} is gone" for name in sorted(old.keys() - new.keys())]
    text = f"{len(new)} locked; {len(moved)} changed, {len(added)} new, {len(gone)} gone"
    torch = f"torch {load().release(target).torch}"
    return Step("packages", "ok", f"{torch}; {text}", (*moved, *added, *gone))


def _names(target: str) -> Step:
    tree = release.tree(target)
    used = names.used(tree)
    absent = [str(one) for one in names.missing(tree, used)]
    if absent:
        return Step("names", "failed", f"of {len(used)}: {some(absent)}", tuple(absent))
    return Step("names", "ok", f"all {len(used)} names of vLLM that our files use are there")


def _kernels(target: str) -> Step:
    """The environment of the release, and every kernel compiled in it."""
    status, output = verb(target, "kernels")
    if status:
        return Step("kernels", "failed", reason(output))
    compiled = output.count("· compiled ")
    text = f"all are compiled, {compiled} of them now, in an environment of its own"
    return Step("kernels", "ok", text)


def _bench(target: str) -> Step:
    status, output = verb(target, "bench", **BENCH)
    if status:
        return Step("bench", "failed", reason(output))
    lines = [line for line in output.splitlines() if line.startswith("outputs: ")]
    return Step("bench", "ok", lines[-1].partition(";")[0] if lines else "valid")


def _doctor(target: str, *, engine: bool) -> Step:
    _, output = verb(target, "doctor", JSON="1")
    try:
        checks = json.loads(output[output.index("{") :])["checks"]
    except ValueError:
        return Step("doctor", "failed", reason(output))
    left_out = () if engine else NEED_AN_ENGINE
    found = [
        f"{check['name']}: {check['detail']}"
        for check in checks
        if check["status"] == "problem" and check["name"] not in left_out
    ]
    if found:
        return Step("doctor", "failed", some(found), tuple(found))
    return Step("doctor", "ok", f"no problem in {plural(len(checks) - len(left_out), 'row')}")


def _tests(target: str) -> Step:
    status, output = verb(target, "test", K=" ".join(f"tests/kernels/{name}" for name in TESTS))
    failed = tuple(line for line in output.splitlines() if line.startswith("FAILED "))
    if status:
        return Step("tests", "failed", some([*failed]) if failed else reason(output), failed)
    summary = [line for line in output.splitlines() if " passed" in line]
    return Step("tests", "ok", summary[-1] if summary else reason(output))
