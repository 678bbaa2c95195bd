# SPDX-License-Identifier: Apache-2.0
"""`make watch K=gemm.triton`: on saving a kernel, compile, check and time it; show what changed.

Two fork servers work side by side: one compiles for the report; the other checks and times on the
GPU, or checks Triton kernels in the interpreter without one. Both fork a child per question, so a
kernel that crashes or hangs costs a verdict, not the watch.
"""

from __future__ import annotations

import contextlib
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Self

from custom_kernels import paths, registry
from custom_kernels.inspect import reports
from custom_kernels.operation import Backend
from rich.console import Console

from workspace import verbs
from workspace.host.errors import WorkspaceError
from workspace.host.settings import device
from workspace.host.text import say
from workspace.watch.fork_client import ForkServer
from workspace.watch.messages import Answer, Check, FindDevice, FoundDevice, Inspect, Shapes
from workspace.watch.screen import Lines, LiveScreen
from workspace.watch.verdict import Verdict, judge

DEFAULT_ARCHITECTURE = "9.0a"
TIMEOUT = 30
"""Seconds after which a check counts as hanging."""
TOP = 10
"""Captured shapes that are timed: a second or two."""
COMPILE_TIMEOUT = 900
"""nvcc does not hang, but a kernel with many templates takes minutes."""
LOOK_SECONDS = 0.3
"""How often the files are compared while a verdict is being made."""


def run(options: verbs.Watch) -> None:
    """Watch until Ctrl-C.

    Raises:
        WorkspaceError: K=, ARCH= or SHAPES= is invalid.
    """
    backends, arch = chosen(options.k), options.arch
    if arch and not re.fullmatch(r"\d+\.\d[a-z]?", arch):
        raise WorkspaceError(f"ARCH={arch} is not an architecture; use e.g. ARCH=9.0a")
    shapes = captured(options.shapes, options.top or TOP, backends) if options.shapes else None
    console = Console(highlight=False)
    watching = Watch(arch, options.timeout or TIMEOUT, shapes)
    with contextlib.suppress(KeyboardInterrupt), watching as watch:
        watch.start()
        names = ", ".join(map(str, backends))
        none = "no GPU" + (", so that no shape of the capture is timed" if shapes else "")
        gpu = f"on {watch.gpu}" if watch.gpu else none
        title = f"watching {names} for {watch.architecture}, {gpu}"
        screen = LiveScreen(title, console) if console.is_terminal else Lines(title)
        with screen:
            for verdict in watch.verdicts(backends, screen.busy):
                screen.show(verdict)
    say("stopped watching")


def chosen(k: str | None) -> list[Backend]:
    """The backends with custom kernels that K= names: `gemm` means all of an operation's."""
    if not k:
        known = ", ".join(map(str, registry.operations()))
        raise WorkspaceError(f"name an operation or backend: make watch K=gemm.triton ({known})")
    try:
        selected = registry.select(k.replace(",", " ").split())
    except registry.BackendError as error:
        raise WorkspaceError(str(error)) from None
    if "." not in k:
        selected = [backend for backend in selected if backend.kind != "torch"]
    if not selected:
        raise WorkspaceError(f"K={k}: none of its backends has custom kernels")
    return selected


def captured(file: str, top: int, backends: Sequence[Backend]) -> Shapes:
    """The shapes that SHAPES= and TOP= name.

    Raises:
        WorkspaceError: the file is not the record of a capture, or an operation is not in it.
    """
    from custom_kernels.bench import shapes
    from custom_kernels.command import UsageError

    path = Path(file).expanduser().resolve()
    try:
        capture = shapes.read(path)
        for cases in {backend.operation.cases for backend in backends}:
            shapes.cases(capture, cases, shapes.dtype_of(capture, cases))
    except UsageError as error:
        raise WorkspaceError(str(error)) from None
    return Shapes(str(path), top)


class Watch:
    """The two fork servers, and the verdicts on each backend."""

    def __init__(self, arch: str | None, timeout: int, shapes: Shapes | None) -> None:
        self.gpu: str | None = None
        self.architecture = arch or DEFAULT_ARCHITECTURE
        self._arch = arch
        self._timeout = timeout
        self._shapes = shapes
        self._numbers: dict[Backend, int] = {}
        self._servers: list[ForkServer] = []
        self._threads = ThreadPoolExecutor(2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()
        self._threads.shutdown()

    def start(self) -> None:
        """Start the servers and look for a GPU.

        Raises:
            WorkspaceError: a server ended.
        """
        interpret = device() != "cuda"
        self._servers = [ForkServer(interpret=False), ForkServer(interpret=interpret)]
        for server in self._servers:
            server.wait_until_ready()
        found = self._servers[0].ask(FindDevice(self._timeout))
        if isinstance(found, FoundDevice) and found.gpu is not None:
            self.gpu = found.gpu
            self.architecture = self._arch or found.architecture or DEFAULT_ARCHITECTURE
        elif not interpret:  # a GPU that torch cannot use
            self._servers.pop().close()
            self._servers.append(ForkServer(interpret=True))
            self._servers[-1].wait_until_ready()

    def verdicts(
        self, backends: Sequence[Backend], busy: Callable[[str], None]
    ) -> Iterator[Verdict]:
        """One for every backend as it is now, then one for each change, without end."""
        # The files are watched before they are read: no save is missed.
        saves = Saves()
        known: dict[Backend, str | None] = dict.fromkeys(backends)
        saved = time.time()
        try:
            while True:
                # By contents, which also finds what was saved during another verdict.
                for backend in backends:
                    if fingerprint(backend) == known[backend]:
                        continue
                    started = time.time() if known[backend] is None else saved
                    known[backend] = version = fingerprint(backend)
                    busy(str(backend))
                    verdict = self.verdict(backend, started, version)
                    if verdict is not None:
                        yield verdict
                saved = saves.wait()
        finally:
            saves.close()

    def verdict(self, backend: Backend, started: float, version: str) -> Verdict | None:
        """Compile and check side by side. None if the files changed meanwhile: nobody waits for
        the verdict on an old version.

        Args:
            started: time of the save.
            version: fingerprint of the files.
        """
        names = (backend.operation.name, backend.name)
        inspect = Inspect(*names, self.architecture, COMPILE_TIMEOUT)
        asked = [self._threads.submit(self._servers[0].ask, inspect)]
        kind = backend.kind if fingerprint(backend) else "torch"
        if self.gpu is not None or kind in ("triton", "torch"):
            check = Check(*names, self.gpu is not None, self._timeout, self._shapes)
            asked.append(self._threads.submit(self._servers[1].ask, check))
        if self._outdated(asked, backend, version):
            return None
        self._numbers[backend] = self._numbers.get(backend, 0) + 1
        inspected, *checked = (future.result() for future in asked)
        return judge(
            self._numbers[backend],
            str(backend),
            inspected,
            checked[0] if checked else None,
            time.time() - started,
        )

    def _outdated(self, asked: Sequence[Future[Answer]], backend: Backend, version: str) -> bool:
        """Wait for the answers; kill the children if the backend's files are saved again."""
        outdated = False
        while wait(asked, LOOK_SECONDS).not_done:
            if not outdated and fingerprint(backend) != version:
                outdated = True
                for server in self._servers:
                    server.kill_child()
        return outdated


class Saves:
    """The times of saves below the package, from construction until `close`."""

    def __init__(self) -> None:
        self._found: queue.Queue[float] = queue.Queue()
        self._stop, self._watching = threading.Event(), threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()
        self._watching.wait()

    def _follow(self) -> None:
        from watchfiles import DefaultFilter, watch

        # A short step: what an editor writes in two steps is still one save.
        for changes in watch(
            paths.PACKAGE,
            watch_filter=DefaultFilter(ignore_entity_patterns=[r"\.tmp$", r"\.pyc$", r"~$"]),
            step=30,
            debounce=300,
            stop_event=self._stop,
            yield_on_timeout=True,
            rust_timeout=500,
        ):
            self._watching.set()  # at the first time-out at the latest
            if not changes:
                continue
            seen = time.time()
            times = [Path(path).stat().st_mtime for _, path in changes if Path(path).exists()]
            # The clock starts with the save, not when it is noticed; an editor may have kept an
            # older time.
            self._found.put(max([time for time in times if seen - 2 < time <= seen], default=seen))

    def wait(self) -> float:
        """Wait for a save; the time of the latest one since the last call."""
        last = self._found.get()
        while not self._found.empty():
            last = self._found.get()
        return last

    def close(self) -> None:
        self._stop.set()


def fingerprint(backend: Backend) -> str:
    """Hash of a backend's files; empty while one cannot be read, in the middle of a save."""
    try:
        return reports.fingerprint(backend)
    except OSError:
        return ""
