# SPDX-License-Identifier: Apache-2.0
"""The verbs that run in the environment: each a short pipeline of steps from other packages.

What a verb needs beyond set-up is imported when it runs, so that a run with nothing to do is fast.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from workspace import set_up, verbs
from workspace.host import settings
from workspace.host.errors import WorkspaceError
from workspace.host.paths import KERNELS, ROOT
from workspace.host.settings import device
from workspace.host.text import say

# --- K= -------------------------------------------------------------------------------------------


def operations() -> list[str]:
    """Found by their files: the package of the kernels may not be installed yet."""
    return sorted(path.parent.name for path in KERNELS.glob("custom_kernels/*/reference.py"))


def split_kernel(k: str) -> tuple[str, str | None]:
    """Operation and backend of OPERATION or OPERATION.BACKEND; the backend is not checked.

    Raises:
        WorkspaceError: the operation does not exist.
    """
    operation, _, backend = k.partition(".")
    if operation not in operations():
        known = ", ".join(operations())
        raise WorkspaceError(f"K={k}: no operation {operation!r}; use one of {known}")
    return operation, backend or None


def split_list(value: str | None) -> list[str]:
    """The entries of a list with commas or spaces."""
    return (value or "").replace(",", " ").split()


def pytest_arguments(k: str | None) -> list[str]:
    """For a kernel: its test file, and its cases in the tests of all operations."""
    if not k:
        return []
    operation, _, backend = k.partition(".")
    if operation in operations():
        file = f"test_{operation} and {backend}" if backend else f"test_{operation}"
        return ["-k", f"({file}) or [{operation}.{backend}"]
    paths = k.split()
    exist = all((ROOT / path.split("::")[0]).exists() for path in paths)
    return paths if exist else ["-k", k]


# --- the verbs ------------------------------------------------------------------------------------


def run_module(module: str, *arguments: str) -> int:
    """Run a module in the checkout; returns its exit status, after a signal that of a shell."""
    command = [sys.executable, "-m", module, *arguments]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    return status if status >= 0 else 128 - status


def flags(**values: str | list[str] | None) -> list[str]:
    """`--name value …` for all values that are set."""
    arguments: list[str] = []
    for name, value in values.items():
        if value:
            arguments += [f"--{name}", *([value] if isinstance(value, str) else value)]
    return arguments


def dev(options: verbs.Dev) -> None:
    from workspace.fork import tree_state
    from workspace.pins import release

    full, force = options.build == "full", options.force
    if full:
        set_up.compile_fork(verbs.ForkBuild(options.cuda_archs, options.jobs, force=force))
    renew = not full and (options.build == "precompiled" or force)
    set_up.up_to_date(partial(set_up.engine, renew=renew, force=force), set_up.kernels)
    version, before = release.selected(), release.active()
    tree_state.require_switchable(version)
    release.activate(version)
    if before not in (None, version):
        say(f"vllm-fork/src points at vLLM {version} now; {before} stays in vllm-fork/releases")
    say("ready")


def doctor(options: verbs.Report) -> int:
    from workspace.doctor import run

    return run(settings.current().mode, as_json=options.json)


def kernels(options: verbs.Kernels) -> None:
    set_up.up_to_date(partial(set_up.kernels, options.arch))


def new_kernel(options: verbs.NewKernel) -> None:
    set_up.package_only()
    from workspace.new_kernel.scaffold import run

    run(options)


def watch(options: verbs.Watch) -> None:
    set_up.package_only()
    from workspace.watch.loop import run

    run(options)


def inspect(options: verbs.Inspect) -> int:
    set_up.package_only()
    json = ["--json"] if options.json else []
    kernels = split_list(options.k)
    return run_module("custom_kernels.inspect", *kernels, *flags(arch=options.arch), *json)


def notebook(_: verbs.NoOptions) -> None:
    set_up.package_only()
    from workspace.notebook import run

    run()


def bench(options: verbs.Bench) -> None:
    from workspace.bench.checkpoint import is_sparse

    only_gemm = not (options.op or options.quantization or is_sparse(options.model))
    operation = "gemm" if only_gemm else None
    set_up.up_to_date(set_up.engine, partial(set_up.kernels_for_device, operation))
    from workspace.bench.runner import run

    run(options)


def trace(options: verbs.Trace) -> None:
    set_up.up_to_date(set_up.engine, partial(set_up.kernels_for_device, None))
    from workspace.trace.runner import run

    run(options)


def predict(options: verbs.Predict) -> None:
    set_up.package_only()
    from workspace.trace.predict import run

    run(options)


def ops(options: verbs.Ops) -> None:
    from workspace.fork.install import install_kernels

    set_up.up_to_date(set_up.engine, install_kernels)
    from workspace.ops import run

    run(options)


def convert(options: verbs.Convert) -> None:
    set_up.package_only()
    from workspace.bench import models
    from workspace.convert.run import Source, run

    model = models.resolve(options.model, device(), dummy=options.dummy)
    has_weights = model.weights != "dummy"
    run(options, Source(model.name, model.folder, model.tokenizer, has_weights))


def evaluate(options: verbs.Eval) -> None:
    set_up.up_to_date(set_up.engine, partial(set_up.kernels_for_device, None))
    from workspace.eval.runner import run

    run(options)


def capture(options: verbs.Capture) -> None:
    from workspace.bench.checkpoint import is_sparse
    from workspace.fork.install import install_kernels

    if options.source:
        set_up.package_only()
    else:
        compiled = partial(set_up.kernels_for_device, None)
        set_up.up_to_date(set_up.engine, compiled if is_sparse(options.model) else install_kernels)
    from workspace.capture.run import run

    run(options)


def bench_kernels(options: verbs.BenchKernels) -> int:
    operation, backend = split_kernel(options.k or "gemm")
    set_up.up_to_date(partial(set_up.kernels_for_device, operation))
    models = [flag for name in split_list(options.model) for flag in ("--model", name)]
    chosen = flags(
        tokens=split_list(options.m),
        pattern=split_list(options.pattern),
        backend=options.backend or backend,
        dtype=options.dtype,
        seconds=options.seconds,
        shapes=options.shapes,
        top=str(options.top) if options.top else None,
    )
    tune = ["--tune"] if options.tune else []
    return run_module("custom_kernels.bench", operation, *models, *chosen, *tune)


def profile(options: verbs.Profile) -> int:
    operation, backend = split_kernel(options.k or "gemm")
    set_up.up_to_date(partial(set_up.kernels_for_device, operation))
    chosen = flags(
        model=options.model,
        layer=options.layer,
        tokens=options.m,
        backend=options.backend or backend,
        dtype=options.dtype,
        pattern=options.pattern,
    )
    return run_module("custom_kernels.profile", operation, *chosen)


def sanitize(options: verbs.Sanitize) -> int:
    words = split_list(options.k)
    if not words:
        known = ", ".join(operations())
        raise WorkspaceError(f"name an operation or backend: make sanitize K=gemm.triton ({known})")
    used = {split_kernel(word)[0] for word in words}
    set_up.up_to_date(partial(set_up.kernels_for_device, used.pop() if len(used) == 1 else None))
    timeout = str(options.timeout) if options.timeout else None
    chosen = flags(tool=options.tool, dtype=options.dtype, timeout=timeout)
    full = ["--full"] if options.full else []
    return run_module("custom_kernels.sanitize", *words, *chosen, *full)


def compare(options: verbs.TwoRecords) -> int:
    if not options.a or not options.b:
        raise WorkspaceError("name two records: make compare A=before.json B=after.json")
    set_up.package_only()
    return run_module("custom_kernels.bench.compare", options.a, options.b)


def report(options: verbs.TwoRecords) -> None:
    set_up.package_only()
    from workspace.report.page import run

    run(options)


def wheel(options: verbs.Wheel) -> None:
    set_up.package_only()
    from workspace.wheel.make import run

    run(options)


def wheel_verify(options: verbs.WheelVerify) -> None:
    set_up.package_only()
    from workspace.wheel.verify import run

    run(options)


def test(options: verbs.Test) -> int:
    operation = (options.k or "").partition(".")[0]
    if not options.k:
        set_up.up_to_date(set_up.engine, set_up.kernels)
    elif operation in operations():
        set_up.up_to_date(partial(set_up.kernels, operation=operation))
    else:  # tests compile what they load, if needed
        set_up.package_only()
    workers = 0 if options.k else _test_processes()
    status = run_module("pytest", "-q", f"-n{workers}", *pytest_arguments(options.k))
    if status == 5:
        raise WorkspaceError(f"no test matches K={options.k}")
    return status


def _test_processes() -> int:
    """How many processes share the tests; 0: none, which a GPU needs, measured by one at a time.

    Tests wait as well as compute, so there is one more than there are cores. Two of them may have
    vLLM's engine beside them, which makes 2.5 GB each.
    """
    import psutil

    if device() != "cpu":
        return 0
    free = psutil.virtual_memory().available / 2**30
    count = min(len(os.sched_getaffinity(0)) + 1, 4, int(free / 2.5))
    return count if count > 1 else 0


def fork_export(options: verbs.ForkExport) -> None:
    from workspace.fork.export import run

    run(options)


def fork_rebase(options: verbs.ForkRebase) -> None:
    from workspace.fork.rebase import run

    run(options)


def upgrade(options: verbs.Upgrade) -> int:
    from workspace.upgrade.upgrade import run

    return run(options)


def bundle(options: verbs.Bundle) -> None:
    from workspace.fork.install import install_kernels

    install_kernels()
    from workspace.bundle.pack import run

    run(options)


def lint(_: verbs.NoOptions) -> int:
    set_up.package_only()
    return run_module("pre_commit", "run", "--all-files")


def lock(options: verbs.Lock) -> None:
    from workspace.environment.lock import run

    for path in run(upgrade=options.upgrade):
        say(f"wrote {path.relative_to(ROOT)}")


RUN: dict[str, Callable[[Any], int | None]] = {
    "dev": dev,
    "doctor": doctor,
    "fork-build": set_up.compile_fork,
    "kernels": kernels,
    "bench": bench,
    "trace": trace,
    "predict": predict,
    "ops": ops,
    "convert": convert,
    "eval": evaluate,
    "new-kernel": new_kernel,
    "watch": watch,
    "inspect": inspect,
    "notebook": notebook,
    "capture": capture,
    "bench-kernels": bench_kernels,
    "compare": compare,
    "report": report,
    "profile": profile,
    "sanitize": sanitize,
    "wheel": wheel,
    "wheel-verify": wheel_verify,
    "test": test,
    "fork-export": fork_export,
    "fork-rebase": fork_rebase,
    "upgrade": upgrade,
    "bundle": bundle,
    "lint": lint,
    "lock": lock,
}
"""Verb → its function."""


def main(arguments: list[str]) -> int:
    """Run the verb; its exit status."""
    verb = verbs.named(*arguments[:1])
    return RUN[verb.name](verb.read()) or 0
