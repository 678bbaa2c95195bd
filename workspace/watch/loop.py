# SPDX-License-Identifier: Apache-2.0
"""`make watch K=gemm.triton`: on saving a kernel, compile, check and time it; show what changed.

Two processes do the work side by side (see warm.py): one compiles for the report; the other checks
and times on the GPU, or checks Triton kernels in the interpreter where there is none. Both fork a
child per question, so a kernel that crashes or hangs costs a verdict, not the watch.

On a terminal one screen stays, with the last versions of every backend; elsewhere each verdict is
printed as lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from custom_kernels import build, inspection, registry
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from workspace.environment.device import device
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT
from workspace.host.text import say

DEFAULT_ARCHITECTURE = "9.0a"
TIMEOUT = 30
"""Seconds after which a check is taken to hang."""
COMPILE_TIMEOUT = 900
"""nvcc does not hang, but a CUTLASS kernel takes minutes."""
HISTORY = 8
SHOWN_FAILURES = 3
COLOURS = {"right": "green", "compiled": "green", "wrong": "red"}


@dataclass(frozen=True)
class Verdict:
    """What came of one version of one backend."""

    number: int
    backend: str
    state: str
    """``right``; ``compiled``, where it cannot be run; ``wrong``; ``does not compile``; ``crashed``
    or ``hangs``."""
    seconds: float
    """From the save to the verdict; for the first version, of the work."""
    details: tuple[str, ...] = ()
    """What is wrong, as the compiler or the check says it."""
    remarks: tuple[str, ...] = ()
    reports: tuple[inspection.Report, ...] = ()
    times: dict[str, dict[str, Any]] = field(default_factory=dict)


def run(k: str | None, arch: str | None = None, timeout: str | None = None) -> None:
    """Watch until Ctrl-C.

    Raises:
        WorkspaceError: K or ARCH names nothing that can be watched.
    """
    backends = chosen(k)
    if arch and not re.fullmatch(r"\d+\.\d[a-z]?", arch):
        raise WorkspaceError(f"ARCH={arch} is not an architecture; write ARCH=9.0a")
    if timeout and not timeout.isdecimal():
        raise WorkspaceError(f"TIMEOUT={timeout} is not a number of seconds")
    console = Console(highlight=False)
    screen: Screen = LiveScreen(console) if console.is_terminal else Lines()
    with contextlib.suppress(KeyboardInterrupt), Watch(arch, int(timeout or TIMEOUT)) as watch:
        watch.start()
        with screen:
            screen.begin(backends, watch)
            for verdict in watch.verdicts(backends, screen.busy):
                screen.show(verdict)
    say("stopped watching")


def chosen(k: str | None) -> list[tuple[str, str]]:
    """K as backends that have kernels: `gemm` is all of its own, `gemm.triton` is one."""
    if not k:
        known = ", ".join(registry.operations())
        raise WorkspaceError(f"name an operation or backend: make watch K=gemm.triton ({known})")
    try:
        found = inspection.chosen(k.replace(",", " ").split())
    except registry.BackendError as error:
        raise WorkspaceError(str(error)) from None
    if "." not in k:
        found = [one for one in found if registry.kind(*one) != "torch"]
    if not found:
        raise WorkspaceError(f"K={k}: no backend there has kernels of its own")
    return found


# --- the work -------------------------------------------------------------------------------------


class Crash(Exception):
    """A child ended without an answer."""

    def __init__(self, state: str, message: str) -> None:
        super().__init__(message)
        self.state = state


class Warm:
    """One warm process and the child that is at work in it."""

    def __init__(self, timeout: int, interpret: bool) -> None:
        self.timeout = timeout
        environment = {
            name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
        }
        # Asking for a GPU through NVML does not initialize CUDA, after which no fork could use it.
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        environment["OPENBLAS_NUM_THREADS"] = "1"  # no threads before a fork
        if interpret:
            environment["TRITON_INTERPRET"] = "1"
        # In a session of its own: Ctrl-C is for the watch, which then ends this.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workspace.watch.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
        self.child: int | None = None
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def wait_until_ready(self) -> None:
        self._line(None)

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer of a child. Raises Crash if it ends without one, or takes too long."""
        assert self.process.stdin is not None
        timeout = COMPILE_TIMEOUT if question["action"] == "inspect" else self.timeout
        self.process.stdin.write(json.dumps(question | {"timeout": timeout}) + "\n")
        self.process.stdin.flush()
        self.child = self._line(None)["child"]
        try:
            found = self._line(timeout)
        except queue.Empty:
            self.end_child()
            self._line(None)
            raise Crash("hangs", "no answer in time: ended") from None
        finally:
            self.child = None
        if "crashed" in found:
            output = f"\n{found['output']}" if found["output"] else ""
            raise Crash("crashed", f"{found['crashed']}{output}")
        return found

    def _line(self, timeout: float | None) -> dict[str, Any]:
        line = self.lines.get(timeout=timeout)
        if not line:
            raise WorkspaceError("the process that compiles kernels ended; run make watch again")
        found: dict[str, Any] = json.loads(line)
        return found

    def end_child(self) -> None:
        child = self.child
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)

    def close(self) -> None:
        self.end_child()
        self.process.kill()
        self.process.wait()


class Watch:
    """The two warm processes, and what there is to say about each backend."""

    def __init__(self, arch: str | None, timeout: int) -> None:
        self.arch = arch
        self.timeout = timeout
        self.gpu: str | None = None
        self.architecture = arch or DEFAULT_ARCHITECTURE
        self.numbers: dict[tuple[str, str], int] = {}
        self.processes: list[Warm] = []

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.close()

    def start(self) -> None:
        """Start what is needed and see whether there is a GPU."""
        interpret = device() != "cuda"
        self.processes = [Warm(self.timeout, False), Warm(self.timeout, interpret)]
        for process in self.processes:
            process.wait_until_ready()
        found = self.processes[0].ask(action="device")
        self.gpu = found["gpu"]
        if self.gpu is None and not interpret:  # a GPU that torch cannot use
            self.processes.pop().close()
            self.processes.append(Warm(self.timeout, True))
            self.processes[-1].wait_until_ready()
        if self.gpu is not None:
            self.architecture = self.arch or found["architecture"]

    def verdicts(
        self, backends: Sequence[tuple[str, str]], busy: Callable[[str], None]
    ) -> Iterator[Verdict]:
        """One for every backend as it is now, then one for each change, for ever."""
        # The files are watched before they are read: no save is missed.
        saves = Saves()
        known: dict[tuple[str, str], str | None] = dict.fromkeys(backends)
        saved = time.time()
        try:
            while True:
                # What was saved while another verdict was made is found by its contents.
                for backend in backends:
                    if _fingerprint(backend) == known[backend]:
                        continue
                    first = known[backend] is None
                    known[backend] = _fingerprint(backend)
                    busy(".".join(backend))
                    started = time.time() if first else saved
                    verdict = self.verdict(backend, started, known[backend])
                    if verdict is not None:
                        yield verdict
                saved = saves.wait()
        finally:
            saves.close()

    def verdict(
        self, backend: tuple[str, str], started: float, version: str | None = None
    ) -> Verdict | None:
        """Compile and check side by side, and say what came of it. None if the files changed
        meanwhile: nobody waits for the verdict on an old version."""
        operation, name = backend
        question = {"operation": operation, "backend": name, "gpu": self.gpu}
        kind = registry.kind(operation, name) if _fingerprint(backend) else "torch"
        answers: dict[str, Any] = {}

        def ask(process: Warm, action: str) -> None:
            try:
                answers[action] = process.ask(
                    action=action, architecture=self.architecture, **question
                )
            except (Crash, WorkspaceError) as error:
                answers[action] = error

        threads = [threading.Thread(target=ask, args=(self.processes[0], "inspect"))]
        if self.gpu is not None or kind in ("triton", "torch"):
            threads.append(threading.Thread(target=ask, args=(self.processes[1], "check")))
        if self._outdated(threads, backend, version):
            return None
        self.numbers[backend] = self.numbers.get(backend, 0) + 1
        return self._judge(backend, answers, started)

    def _outdated(
        self, threads: Sequence[threading.Thread], backend: tuple[str, str], version: str | None
    ) -> bool:
        """Run them to their end, or until the backend's files are saved again."""
        for thread in threads:
            thread.start()
        outdated = False
        looked = time.monotonic()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.02)
                if not outdated and time.monotonic() > looked + 0.3:
                    looked = time.monotonic()
                    outdated = version is not None and _fingerprint(backend) != version
                    if outdated:
                        for process in self.processes:
                            process.end_child()
        return outdated

    def _judge(self, backend: tuple[str, str], answers: dict[str, Any], started: float) -> Verdict:
        details: list[str] = []
        state = "compiled"
        inspected, checked = answers["inspect"], answers.get("check", {})
        for answer in (inspected, checked):
            if isinstance(answer, WorkspaceError):
                raise answer
        reports: tuple[inspection.Report, ...] = ()
        remarks: list[str] = []
        if isinstance(inspected, Crash):
            state = inspected.state
            details.append(f"while it was compiled: {inspected}")
        elif "error" in inspected:
            state = "does not compile"
            details.append(inspected["error"])
        else:
            reports = tuple(inspection.Report(**one) for one in inspected["reports"])
            remarks += inspected["warnings"]
        times: dict[str, dict[str, Any]] = {}
        if isinstance(checked, Crash) and state != "does not compile":
            state = checked.state
            details.append(f"while it was checked: {checked}")
        elif "error" in checked and state == "compiled":
            state = "crashed"
            details.append(checked["error"])
        elif "wrong" in checked and state == "compiled":
            state = "wrong" if checked["wrong"] else "right"
            wrong = checked["wrong"]
            details += wrong[:SHOWN_FAILURES]
            if len(wrong) > SHOWN_FAILURES:
                details.append(f"… {len(wrong)} of {checked['checked']} cases are wrong")
            times = checked.get("times", {})
            if not wrong:
                remarks.insert(0, f"{checked['checked']} cases right")
        elif "not_checked" in checked:
            remarks.append(f"not run: {checked['not_checked']}")
        elif not checked and state == "compiled":
            remarks.append("compiled only: without a GPU it cannot run")
        return Verdict(
            number=self.numbers[backend],
            backend=".".join(backend),
            state=state,
            seconds=time.time() - started,
            details=tuple(details),
            remarks=tuple(remarks),
            reports=reports,
            times=times,
        )


class Saves:
    """The times of saves below the package, from when this is made until it is closed."""

    def __init__(self) -> None:
        self._found: queue.Queue[float] = queue.Queue()
        self._stop, self._watched = threading.Event(), threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()
        self._watched.wait()

    def _follow(self) -> None:
        from watchfiles import DefaultFilter, watch

        # A short step: what an editor writes in two steps is still one save.
        for changes in watch(
            build.PACKAGE,
            watch_filter=DefaultFilter(ignore_entity_patterns=[r"\.tmp$", r"\.pyc$", r"~$"]),
            step=30,
            debounce=300,
            stop_event=self._stop,
            yield_on_timeout=True,
            rust_timeout=500,
        ):
            self._watched.set()  # the first time-out says that it is
            if not changes:
                continue
            seen = time.time()
            times = [Path(path).stat().st_mtime for _, path in changes if Path(path).exists()]
            # The clock starts with the save, not when it is noticed; an editor may have kept an
            # older time.
            self._found.put(max([time for time in times if seen - 2 < time <= seen], default=seen))

    def wait(self) -> float:
        """Wait for a save; the time of the last one that was not waited for yet."""
        last = self._found.get()
        while not self._found.empty():
            last = self._found.get()
        return last

    def close(self) -> None:
        self._stop.set()


def _fingerprint(backend: tuple[str, str]) -> str:
    """Of all files of a backend; empty while one of them cannot be read, between two writes."""
    try:
        return inspection.fingerprint(*backend)
    except OSError:
        return ""


# --- what is shown --------------------------------------------------------------------------------


def figures(verdict: Verdict, before: Verdict | None) -> list[str]:
    """A line per kernel and per timed case, with the change since the last that compiled."""
    earlier = {report.kernel: report for report in before.reports} if before else {}
    lines = []
    for report in verdict.reports:
        old = earlier.get(report.kernel)

        def change(name: str, unit: str = "", report: Any = report, old: Any = old) -> str:
            value = getattr(report, name)
            difference = value - getattr(old, name) if old else 0
            return f"{value}{unit}" + (f" ({difference:+}{unit})" if difference else "")

        tensor = " ".join(f"{name} x{count}" for name, count in sorted(report.tensor.items()))
        lines.append(
            f"{inspection.short(report.kernel)} [{report.architecture}]: "
            f"registers {change('registers')}, spills {change('spills', ' B')}, "
            f"shared {change('shared', ' B')}, SASS {change('sass', ' B')}"
            + (f", {tensor}" if tensor else "")
            + (f", load {report.load}" if report.load else "")
            + (f", store {report.store}" if report.store else "")
        )
    for case, found in verdict.times.items():
        if found["us"] is None:
            lines.append(f"{case}: not timed: {found['failure']}")
            continue
        old_time = ((before.times if before else {}).get(case) or {}).get("us")
        versus = f" ({found['us'] / old_time - 1:+.1%})" if old_time else ""
        ratio = f", {found['ratio']:.2f} x {found['baseline']}" if found["ratio"] else ""
        lines.append(f"{case}: {found['us']:.2f} µs{versus}{ratio}")
    return lines


class Screen:
    """Where verdicts go; remembers each backend's versions."""

    def __init__(self) -> None:
        self.history: dict[str, list[Verdict]] = {}

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def begin(self, backends: Sequence[tuple[str, str]], watch: Watch) -> None:
        self.title = f"watching {', '.join(map('.'.join, backends))} for {watch.architecture}, " + (
            f"on {watch.gpu}" if watch.gpu else "no GPU"
        )

    def busy(self, backend: str) -> None:
        """A backend is being worked on."""

    def show(self, verdict: Verdict) -> None:
        self.history.setdefault(verdict.backend, []).append(verdict)

    def before(self, verdict: Verdict) -> Verdict | None:
        """The last version before it that compiled."""
        earlier = self.history.get(verdict.backend, [])
        return next((one for one in reversed(earlier) if one.reports and one is not verdict), None)


class Lines(Screen):
    """Each verdict as lines, where there is no terminal."""

    def begin(self, backends: Sequence[tuple[str, str]], watch: Watch) -> None:
        super().begin(backends, watch)
        print(self.title, flush=True)

    def show(self, verdict: Verdict) -> None:
        lines = figures(verdict, self.before(verdict))
        super().show(verdict)
        remarks = f" ({'; '.join(verdict.remarks)})" if verdict.remarks else ""
        state = f"{verdict.backend}: {verdict.state}{remarks}, {verdict.seconds:.2f} s"
        below = [line.replace("\n", "\n    ") for line in [*verdict.details, *lines]]
        # In one piece: whoever reads along gets a verdict whole.
        print("\n    ".join([f"[{verdict.number}] {state}", *below]), flush=True)


class LiveScreen(Screen):
    """One screen that stays: per backend the last version in full, the ones before in a row
    each."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.working = ""
        self.live = Live(console=console, auto_refresh=False, screen=False)

    def __enter__(self) -> LiveScreen:
        self.console.clear()
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def busy(self, backend: str) -> None:
        self.working = backend
        self.live.update(self._draw(), refresh=True)

    def show(self, verdict: Verdict) -> None:
        super().show(verdict)
        self.working = ""
        self.live.update(self._draw(), refresh=True)

    def _draw(self) -> RenderableType:
        parts: list[RenderableType] = [Text(f"{self.title}    Ctrl-C ends", style="dim")]
        for backend, versions in self.history.items():
            parts.append(self._versions(backend, versions))
            last = versions[-1]
            earlier = [one for one in versions[:-1] if one.reports]
            parts += [Text(f"  {line}", style="red") for line in last.details]
            parts += [
                Text.from_markup("  " + _marked(line))
                for line in figures(last, earlier[-1] if earlier else None)
            ]
            parts += [Text(f"  {line}", style="yellow") for line in last.remarks]
        if self.working:
            parts.append(Text(f"working on {self.working} …", style="cyan"))
        return Group(*parts)

    def _versions(self, backend: str, versions: Sequence[Verdict]) -> Table:
        table = Table(title=backend, title_justify="left", title_style="bold", header_style="bold")
        table.add_column("", justify="right")
        table.add_column("verdict", no_wrap=True)
        for name in ("registers", "spills", "shared", "SASS", "time", "from save"):
            table.add_column(name, justify="right", no_wrap=True)
        for one in versions[-HISTORY:]:
            style = COLOURS.get(one.state, "red")
            times = [found["us"] for found in one.times.values() if found["us"] is not None]
            table.add_row(
                str(one.number),
                f"[{style}]{one.state}[/]",
                *(_most(one.reports, name) for name in ("registers", "spills", "shared", "sass")),
                ", ".join(f"{value:.1f} µs" for value in times) or "-",
                f"{one.seconds:.2f} s",
            )
        return table


def _most(reports: Sequence[inspection.Report], name: str) -> str:
    return str(max(getattr(report, name) for report in reports)) if reports else "-"


def _marked(line: str) -> str:
    """Changes in colour: more is red, less is green."""
    line = escape(line)
    line = re.sub(r"(\(\+[^)]*\))", r"[red]\1[/]", line)
    return re.sub(r"(\(-[^)]*\))", r"[green]\1[/]", line)
