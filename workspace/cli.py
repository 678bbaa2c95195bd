# SPDX-License-Identifier: Apache-2.0
"""The verbs: thin, each a short pipeline over the module of the same name.

Every option can be given as a make variable (`make bench TP=2`) because make passes its
variables on in the environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import typer

from workspace.environment.device import device
from workspace.host import setup_lock
from workspace.host.errors import WorkspaceError, told_in_one_line
from workspace.host.paths import KERNELS, ROOT
from workspace.host.text import say

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


def option(variable: str, help_text: str) -> Any:
    # make passes an unset variable as an empty one; both mean "not given".
    return typer.Option(envvar=variable, help=help_text, show_default=False)


Text = str | None


def run_tool(command: list[str]) -> int:
    """Run a program in the checkout; its exit status, of one that a signal ended as in a shell."""
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    return status if status >= 0 else 128 - status


def fork_and_engine(*, renew: bool = False) -> None:
    """The fork's tree, its binaries and its editable install."""
    from workspace.fork import install, prepare

    prepare.ensure()
    install.install_fork(device(), renew=renew)  # type: ignore[arg-type]


def set_up(
    *,
    engine: bool = True,
    renew: bool = False,
    arch: str | None = None,
    operation: str | None = None,
    for_device: bool = False,
) -> None:
    """Bring fork, install and kernels up to date, then let the next make in.

    Kernels are compiled while the fork is unpacked and installed: neither needs the other. A verb
    that needs the kernels of one operation waits for those only; `for_device`, for those that this
    machine's device can run, which on a CPU are none.
    """

    def kernels_package() -> None:
        from workspace.fork import install

        install.install_kernels()
        from workspace import kernels

        if for_device:
            kernels.run_for_device(device(), operation)
        else:
            kernels.run(arch, operation)

    with ThreadPoolExecutor() as pool:
        lanes = [pool.submit(kernels_package)]
        if engine:
            lanes.append(pool.submit(fork_and_engine, renew=renew))
        for lane in reversed(lanes):
            lane.result()
    let_the_next_in()


def let_the_next_in() -> None:
    """Set-up is done: another make may start its own."""
    descriptor = os.environ.pop(setup_lock.VARIABLE, None)
    if descriptor:
        os.close(int(descriptor))


def install_package() -> None:
    """Only the kernels' package, nothing compiled: for verbs that compile what they need, and must
    start also when a kernel does not compile."""
    from workspace.fork import install

    install.install_kernels()
    let_the_next_in()


@app.command()
def dev(
    build: Annotated[
        Text, option("BUILD", "full: compile vLLM here; precompiled: the wheel's binaries again.")
    ] = None,
    cuda_archs: Annotated[Text, option("CUDA_ARCHS", "For BUILD=full, e.g. 9.0a.")] = None,
    jobs: Annotated[Text, option("JOBS", "For BUILD=full: compilers at once.")] = None,
) -> None:
    """Set everything up: environment, fork, binaries, kernels."""
    from workspace.fork import tree_state
    from workspace.pins import release

    if build not in (None, "", "full", "precompiled"):
        raise WorkspaceError(f"BUILD={build} is not known; give BUILD=full or BUILD=precompiled")
    if build == "full":
        compile_fork(None, cuda_archs, jobs)
    set_up(renew=build != "full" and (build == "precompiled" or os.environ.get("FORCE") == "1"))
    version = release.selected()
    if before := tree_state.switch(version):
        say(f"vllm-fork/src shows vLLM {version} now; {before} stays in vllm-fork/releases")
    say("ready")


def compile_fork(target: Text, cuda_archs: Text, jobs: Text) -> None:
    """vLLM's own C++ and CUDA into a tree that is set up; nobody else is let in before the end."""
    from workspace.fork import install

    fork_and_engine()
    install.install_kernels()
    from workspace.fork import build

    build.run(device(), target, cuda_archs, jobs)  # type: ignore[arg-type]


@app.command("fork-build")
def fork_build(
    target: Annotated[Text, option("TARGET", "One extension, e.g. _C; default: all.")] = None,
    cuda_archs: Annotated[Text, option("CUDA_ARCHS", "Default: of this machine's GPUs.")] = None,
    jobs: Annotated[Text, option("JOBS", "Default: by cores and memory.")] = None,
) -> None:
    """Compile what changed in vLLM's own C++ and CUDA, and put it into the tree."""
    compile_fork(target or None, cuda_archs, jobs)


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", envvar="JSON")] = False) -> None:
    """Say what is ready, what is not, and what to do about it."""
    from workspace import doctor as module

    raise typer.Exit(module.run(os.environ.get("ENV", "uv"), as_json=json))


@app.command()
def kernels(
    arch: Annotated[Text, option("ARCH", "GPU architectures, e.g. 9.0a or 8.0,9.0a.")] = None,
) -> None:
    """Compile the kernels that changed."""
    set_up(engine=False, arch=arch)


@app.command()
def bench(
    model: Annotated[Text, option("MODEL", "Folder or hub id.")] = None,
    input_len: Annotated[Text, option("INPUT_LEN", "Prompt tokens per request.")] = None,
    output_len: Annotated[Text, option("OUTPUT_LEN", "New tokens per request.")] = None,
    num_prompts: Annotated[Text, option("NUM_PROMPTS", "Requests per round.")] = None,
    metric: Annotated[Text, option("METRIC", "throughput or latency.")] = None,
    backend: Annotated[Text, option("BACKEND", "GEMM backend of the custom variant.")] = None,
    layers: Annotated[
        Text, option("LAYERS", 'Patterns of the layers that run our kernel, e.g. "*.mlp.*".')
    ] = None,
    quantization: Annotated[
        Text, option("QUANTIZATION", "A quantization method of ours, as the custom variant.")
    ] = None,
    repeats: Annotated[Text, option("REPEATS", "Pairs of engine starts.")] = None,
    rounds: Annotated[Text, option("ROUNDS", "Measured rounds per engine start.")] = None,
    tp: Annotated[Text, option("TP", "Tensor-parallel processes.")] = None,
    eager: Annotated[Text, option("EAGER", "1: no torch.compile, no CUDA graphs.")] = None,
    baseline: Annotated[
        Text, option("BASELINE", "pristine: the switch off against the unpatched release.")
    ] = None,
) -> None:
    """Run vLLM's own benchmark: stock against custom."""
    from workspace import bench as module

    given = {
        "model": model, "input_len": input_len, "output_len": output_len,
        "num_prompts": num_prompts, "metric": metric, "backend": backend,
        "layers": layers, "quantization": quantization, "repeats": repeats, "rounds": rounds,
        "tp": tp, "eager": eager, "baseline": baseline,
    }  # fmt: skip
    options = module.options({name: value for name, value in given.items() if value})
    set_up(operation=None if quantization else "gemm", for_device=True)
    module.run(options)


@app.command("bench-kernels")
def bench_kernels(
    k: Annotated[Text, option("K", "OPERATION or OPERATION.BACKEND; default: gemm.")] = None,
    model: Annotated[Text, option("MODEL", "Whose layer shapes; several with commas.")] = None,
    m: Annotated[Text, option("M", "Numbers of tokens, e.g. 1,16,4096.")] = None,
    backend: Annotated[Text, option("BACKEND", "With commas; default: all that can run.")] = None,
    dtype: Annotated[Text, option("DTYPE", "Default: the operation's first.")] = None,
    pattern: Annotated[Text, option("PATTERN", "Sparsity patterns, e.g. 2:4,6:8.")] = None,
    seconds: Annotated[Text, option("SECONDS", "Device time per shape.")] = None,
    tune: Annotated[Text, option("TUNE", "1: choose by these results from now on.")] = None,
) -> None:
    """Time kernels on the GPU against what a user would call instead."""
    operation, named = _kernel(k or "gemm")
    backend = backend or named
    set_up(engine=False, operation=operation, for_device=True)
    command = [sys.executable, "-m", "custom_kernels.bench", operation]
    for name in _words(model):
        command += ["--model", name]
    for flag, values in (("--tokens", _words(m)), ("--pattern", _words(pattern))):
        command += [flag, *values] if values else []
    for flag, value in (("--backend", backend), ("--dtype", dtype), ("--seconds", seconds)):
        command += [flag, value] if value else []
    command += ["--tune"] if tune == "1" else []
    raise typer.Exit(run_tool(command))


@app.command()
def inspect(
    k: Annotated[Text, option("K", "OPERATION or OPERATION.BACKEND; several with commas.")] = None,
    arch: Annotated[Text, option("ARCH", "GPU architectures, e.g. 9.0a or 8.0,9.0a.")] = None,
    json: Annotated[bool, typer.Option("--json", envvar="JSON")] = False,
) -> None:
    """Registers, spills, shared memory, occupancy and instructions of every kernel; no GPU."""
    install_package()
    command = [sys.executable, "-m", "custom_kernels.inspection", *_words(k)]
    command += ["--arch", arch] if arch else []
    command += ["--json"] if json else []
    raise typer.Exit(run_tool(command))


@app.command("new-kernel")
def new_kernel(
    op: Annotated[Text, option("OP", "An operation, there or new.")] = None,
    backend: Annotated[Text, option("BACKEND", "triton, cuda or cupy.")] = None,
    name: Annotated[Text, option("NAME", "The file's name; default: BACKEND.")] = None,
) -> None:
    """Write a small kernel that works, to start from."""
    install_package()
    from workspace.new_kernel import scaffold as module

    module.run(op, backend, name)


@app.command()
def watch(
    k: Annotated[Text, option("K", "OPERATION or OPERATION.BACKEND; several with commas.")] = None,
    arch: Annotated[Text, option("ARCH", "Compile for it; default: the GPU's, else 9.0a.")] = None,
    timeout: Annotated[Text, option("TIMEOUT", "Seconds after which a kernel hangs.")] = None,
) -> None:
    """On saving a kernel: compile, check and time it, and show what changed."""
    install_package()
    from workspace.watch import loop as module

    module.run(k, arch, timeout)


@app.command()
def notebook() -> None:
    """JupyterLab over notebooks/, on this machine only."""
    install_package()
    from workspace import notebook as module

    module.run()


@app.command()
def compare(
    a: Annotated[Text, option("A", "The record before.")] = None,
    b: Annotated[Text, option("B", "The record after.")] = None,
) -> None:
    """Compare two records, of kernels or of the engine: faster, slower, same or ambiguous."""
    from workspace.fork import install

    if not a or not b:
        raise WorkspaceError("name two records: make compare A=before.json B=after.json")
    install.install_kernels()
    command = [sys.executable, "-m", "custom_kernels.compare", a, b]
    raise typer.Exit(run_tool(command))


@app.command()
def profile(
    k: Annotated[Text, option("K", "OPERATION or OPERATION.BACKEND; default: gemm.")] = None,
    model: Annotated[Text, option("MODEL", "Whose layer shapes.")] = None,
    layer: Annotated[Text, option("LAYER", "Which of its layers; default: the first.")] = None,
    m: Annotated[Text, option("M", "Number of tokens.")] = None,
    backend: Annotated[Text, option("BACKEND", "Default: the best for the device.")] = None,
    dtype: Annotated[Text, option("DTYPE", "Default: the operation's first.")] = None,
    pattern: Annotated[Text, option("PATTERN", "A sparsity pattern, e.g. 6:8.")] = None,
) -> None:
    """Run Nsight Compute on one call of one backend."""
    operation, named = _kernel(k or "gemm")
    backend = backend or named
    set_up(engine=False, operation=operation, for_device=True)
    command = [sys.executable, "-m", "custom_kernels.profiling", operation]
    given = {
        "--model": model, "--layer": layer, "--tokens": m, "--backend": backend,
        "--dtype": dtype, "--pattern": pattern,
    }  # fmt: skip
    for flag, value in given.items():
        command += [flag, value] if value else []
    raise typer.Exit(run_tool(command))


def _operations() -> list[str]:
    """By their files: the package may not be installed yet."""
    return sorted(path.parent.name for path in KERNELS.glob("custom_kernels/*/reference.py"))


def _kernel(k: str) -> tuple[str, Text]:
    """OPERATION or OPERATION.BACKEND; the backend is checked by who uses it."""
    operation, _, backend = k.partition(".")
    if operation not in _operations():
        known = ", ".join(_operations())
        raise WorkspaceError(f"K={k}: there is no operation {operation!r}; there are: {known}")
    return operation, backend or None


def _words(value: Text) -> list[str]:
    return (value or "").replace(",", " ").split()


def selection(k: Text) -> list[str]:
    """K= as pytest's arguments. For a kernel: its own test file, and what the tests of all
    operations do with it."""
    if not k:
        return []
    operation, _, backend = k.partition(".")
    if operation in _operations():
        own = f"test_{operation} and {backend}" if backend else f"test_{operation}"
        return ["-k", f"({own}) or [{operation}.{backend}"]
    return [k] if (ROOT / k.split("::")[0]).exists() else ["-k", k]


@app.command("test")
def run_tests(
    k: Annotated[
        Text, option("K", "OPERATION[.BACKEND], a path, or words as for pytest -k.")
    ] = None,
) -> None:
    """Run the tests; K= narrows them to a kernel, a path or names."""
    operation = (k or "").partition(".")[0]
    if not k:
        set_up()
    elif operation in _operations():
        set_up(engine=False, operation=operation)
    else:  # tests compile what they load, where it is not there yet
        install_package()
    # Much of the time of the whole is spent waiting for processes that use one core. A GPU is
    # measured by one at a time.
    share = not k and len(os.sched_getaffinity(0)) > 1 and device() == "cpu"
    workers = ["-n", "2"] if share else []
    command = [sys.executable, "-m", "pytest", "-q", *workers, *selection(k)]
    status = run_tool(command)
    if status == 5:
        raise WorkspaceError(f"no test matches K={k}")
    raise typer.Exit(status)


@app.command("fork-export")
def fork_export() -> None:
    """Write the tree's commits as the release's queue of patches."""
    from workspace.fork import export as module

    module.run()


@app.command("fork-rebase")
def fork_rebase(
    version: Annotated[Text, option("VERSION", "The vLLM release to go to.")] = None,
    abort: Annotated[bool, typer.Option("--abort", envvar="ABORT")] = False,
) -> None:
    """Carry the tree's commits over to another vLLM release."""
    from workspace.fork import rebase as module

    module.run(version, abort=abort)


@app.command()
def bundle(
    target: Annotated[Text, option("TARGET", "The host's inventory.json.")] = None,
    part_size: Annotated[Text, option("PARTS", "Size of a part at most, e.g. 60M.")] = None,
) -> None:
    """Pack what a host without a network needs, in parts."""
    from workspace.bundle import pack as module
    from workspace.fork import install

    install.install_kernels()
    module.run(target, part_size)


@app.command()
def lint() -> None:
    """Run every pre-commit hook over all files."""
    install_package()
    command = [sys.executable, "-m", "pre_commit", "run", "--all-files"]
    raise typer.Exit(run_tool(command))


@app.command()
def lock(
    upgrade: Annotated[Text, option("UPGRADE", "1: newest versions the pins allow.")] = None,
) -> None:
    """Make the locks and environment.yml from pins.toml."""
    from workspace.environment import lock as module

    for path in module.run(upgrade=upgrade == "1"):
        say(f"wrote {path.relative_to(ROOT)}")


def main() -> None:
    with told_in_one_line():
        try:
            app(standalone_mode=True)
        except SystemExit as end:
            if end.code == 130:  # Typer's answer to Ctrl-C
                print("interrupted; run the same command again to go on", file=sys.stderr)
            raise
