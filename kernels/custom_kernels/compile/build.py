# SPDX-License-Identifier: Apache-2.0
"""Compile ``<operation>/<backend>.cu`` into a plain shared library behind apache-tvm-ffi.

The name of a library contains the hash of its inputs: the source and every file that it includes
from this package, the flags, the versions of nvcc, the host compiler and tvm-ffi, the
architectures. So a library that exists is up to date. It is written in a scratch folder and renamed
when complete: a killed compile leaves no library, and the next one clears its scratch folder.

A compile waits until the machine has a core and memory for it (see jobs). Its time and peak memory
are kept in the report beside the library.

This module does not import torch: a run with nothing to compile takes a fraction of a second.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from custom_kernels import paths, registry, shipped
from custom_kernels.compile import jobs, ptx, sources, toolchain
from custom_kernels.compile.ptx import Kernel
from custom_kernels.compile.toolchain import BuildError
from custom_kernels.operation import Backend

if TYPE_CHECKING:
    import torch

FLAGS = ("-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-cudart=none", "-Xptxas=-v")
PEAK_MEMORY = 5 * jobs.GIB // 2
"""Bytes that a compile may take at most, and the estimate for the first one."""
REPORT = 2
"""Format of the report beside a library; a library with another is compiled again."""
KEPT_LIBRARIES = 8
"""Older libraries of a backend that stay in the cache, for going back and forth between edits."""

_NVCC_ENVIRONMENT = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """One library in the cache."""

    backend: Backend
    path: Path
    architectures: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    compiled: bool
    """True if this call compiled it, False if it was up to date."""
    seconds: float
    """Duration of this call."""
    peak_memory: int
    """Bytes, of the largest process of its compile."""


# --- compiling ------------------------------------------------------------------------------------


def build_all(
    architectures: Sequence[str] | None = None,
    force: bool = False,
    progress: Callable[[Built], None] | None = None,
    operation: str | None = None,
) -> list[Built]:
    """Bring every backend (of ``operation``, if given) up to date, in parallel; one that is written
    for none of ``architectures`` (default: the pinned ones) is left out.

    ``progress`` is called with each library as it becomes ready. Raises BuildError, after all
    others are built, with the compiler's messages.
    """
    architectures = tuple(architectures or sources.pinned_architectures())
    remove_stale()
    wanted = [
        backend
        for backend in registry.compiled()
        if backend.architectures(architectures) and operation in (None, backend.operation.name)
    ]
    stale = sum(force or not library_path(one, architectures).is_file() for one in wanted)
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, stale))
    # The one that took longest comes first, so that none is left alone at the end.
    wanted.sort(key=lambda backend: _last_report(backend).get("seconds", 0), reverse=True)
    done: list[Built] = []
    errors: list[str] = []
    with ThreadPoolExecutor(max_workers=max(1, len(wanted))) as pool:
        running = [pool.submit(build, backend, architectures, force, threads) for backend in wanted]
        for job in as_completed(running):
            try:
                done.append(job.result())
            except BuildError as error:
                errors.append(str(error))
                continue
            if progress is not None:
                progress(done[-1])
    if errors:
        raise BuildError("\n\n".join(errors))
    return sorted(done, key=lambda built: str(built.backend))


def build(
    backend: Backend, architectures: Sequence[str], force: bool = False, threads: int = 0
) -> Built:
    """Bring one backend up to date for ``architectures`` and return its library.

    ``threads``: parallel compile jobs for several architectures; 0: one per core. If two processes
    build the same library, the second waits for the first and does not compile.
    """
    started = time.perf_counter()
    architectures = backend.architectures(architectures)
    path = library_path(backend, architectures)
    compiled = False
    if force or not path.is_file():
        with _lock(str(backend)):
            if force or not path.is_file():
                _clear_scratch(str(backend))
                threads = min(threads or len(os.sched_getaffinity(0)), len(architectures))
                _compile(backend, architectures, path, threads)
                _drop_old(backend)
                compiled = True
    report = json.loads(_report_path(path).read_text())
    kernels = tuple(Kernel(**item) for item in report["kernels"])
    return Built(
        backend=backend,
        path=path,
        architectures=architectures,
        kernels=kernels,
        compiled=compiled,
        seconds=time.perf_counter() - started,
        peak_memory=int(report["peak_memory"]),
    )


def library_path(backend: Backend, architectures: Sequence[str]) -> Path:
    """Where the backend's library for ``architectures`` is, or will be once it is compiled."""
    tools = toolchain.find()
    architectures = backend.architectures(architectures)
    recipe = {
        "report": REPORT,
        "headers": [package for _, package in sources.headers(backend)],
        "files": {
            str(path.relative_to(paths.PACKAGE)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sources.files(backend)
        },
        "flags": [*FLAGS, *_code_flags(architectures)],
        "libraries": sources.libraries(backend),
        "tools": tools.versions(),
        "environment": {name: os.environ.get(name, "") for name in _NVCC_ENVIRONMENT},
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return paths.cache_dir() / f"{backend}-{key[:20]}.so"


def nvcc_command(
    backend: Backend, architectures: Sequence[str], name: Callable[[Path], str] = str
) -> list[str]:
    """How nvcc is called for a backend, less what concerns the output.

    ``name``: a path as it is passed. Raises BuildError if a tool or a header is missing.
    """
    tools = toolchain.find()
    headers = [*(folder for folder, _ in sources.headers(backend)), *tools.include]
    return [
        str(tools.nvcc),
        *FLAGS,
        *_code_flags(architectures),
        f"-ccbin={name(tools.cxx)}",
        f"-I{name(paths.PACKAGE)}",
        "-isystem",
        name(tools.tvm_ffi / "include"),
        *(item for folder in headers for item in ("-isystem", name(folder))),
        name(backend.cuda),
    ]


def remove_stale() -> None:
    """Remove the scratch folders of killed compiles, not those of running ones."""
    for scratch in paths.cache_dir().glob("*.tmp"):
        name = scratch.name.split("-", 1)[0]
        with _lock(name, wait=False) as held:
            if held:
                _clear_scratch(name)


def unavailable_reason(backend: Backend, device_architecture: str) -> str | None:
    """Why a backend neither is nor can be compiled for the architecture; None if it can."""
    if not backend.architectures((device_architecture,)):
        return f"{backend.cuda.name} is not written for {device_architecture}"
    try:
        if existing(backend, device_architecture) is None:
            toolchain.find()
    except BuildError as error:
        return str(error)
    return None


@functools.cache
def load(backend: Backend, device: "torch.device | None" = None) -> Any:
    """Load a backend's library as a ``tvm_ffi.Module``; compile it first if it is not up to date.

    Any library that holds the device's architecture serves; one that must be compiled is compiled
    for this architecture alone. Without ``device`` (or on the CPU) it is the library for the pinned
    architectures.
    """
    # torch first: it brings the CUDA libraries, and a library that is loaded is not loaded twice.
    import torch
    import tvm_ffi

    if device is None or torch.device(device).type != "cuda":
        path = build(backend, sources.pinned_architectures()).path
    else:
        target = sources.architecture(torch.device(device))
        found = existing(backend, target)
        if found is None:
            log.warning("compiling %s for %s: this happens once", backend, target)
            found = build(backend, (target,)).path
        path = found
    return tvm_ffi.load_module(str(path))


def existing(backend: Backend, device_architecture: str) -> Path | None:
    """A library that is up to date and holds the device's architecture: a wheel's, or compiled."""
    if path := shipped.library(str(backend), device_architecture):
        return path
    for wanted in (sources.pinned_architectures(), (device_architecture,)):
        architectures = backend.architectures(wanted)
        if device_architecture in architectures:
            path = library_path(backend, architectures)
            if path.is_file():
                return path
    return None


def _compile(backend: Backend, architectures: Sequence[str], path: Path, threads: int) -> None:
    tools = toolchain.find()
    if tools.origin == "system":
        _warn_once(f"compiling with {tools.nvcc}, the system's: this environment holds no nvcc")
    try:
        with tempfile.TemporaryDirectory(
            prefix=f"{backend}-", suffix=".tmp", dir=path.parent, ignore_cleanup_errors=True
        ) as scratch:
            _compile_in(Path(scratch), backend, architectures, path, threads)
    except OSError as error:
        raise _not_writable(path.parent, error) from None


def _compile_in(
    scratch: Path, backend: Backend, architectures: Sequence[str], path: Path, threads: int
) -> None:
    tools, quotable = toolchain.find(), _Quotable(scratch)
    names = ("tvm_ffi", *sources.libraries(backend))
    libraries = [toolchain.library(tools, name) for name in names]
    command = [
        *nvcc_command(backend, architectures, quotable),
        f"--threads={threads}",
        "-shared",
        "-Xcompiler=-fPIC",
        "-o",
        path.name,
        "--keep",  # the PTX, for the report; it goes when the scratch folder goes
        "--keep-dir=.",
        # Packages hold only lib<name>.so.<major>, without the plain link name. The result asks
        # for it by the name that is written in it, which is the one that torch has loaded.
        *(f"-L{quotable(library.parent)}" for library in libraries),
        *(f"-l:{library.name}" for library in libraries),
    ]
    need = _last_report(backend).get("peak_memory") or PEAK_MEMORY
    with jobs.slot(need * threads) as slot:
        ran = quotable.named(_run_nvcc(command, scratch, slot.fileno()))
    if ran.status != 0:
        raise BuildError(_failure(backend, ran))
    if library_path(backend, architectures) != path:
        raise BuildError(f"{backend.cuda} changed while it was compiled: re-run")
    report = {
        "source": str(backend),
        "architectures": list(architectures),
        "tools": tools.versions(),
        "seconds": round(ran.seconds, 1),
        "peak_memory": ran.peak_memory,
        "kernels": [asdict(kernel) for kernel in ptx.kernels(ran.log, scratch)],
    }
    # The report first: where there is a library, there is its report.
    output, report_output = scratch / path.name, scratch / "report.json"
    report_output.write_text(json.dumps(report, indent=1))
    for written in (output, report_output):
        with written.open("rb") as file:
            os.fsync(file.fileno())
    report_output.replace(_report_path(path))
    output.replace(path)


@dataclass(frozen=True)
class _Ran:
    """One run of nvcc; the memory is that of the largest of its processes."""

    status: int
    log: str
    seconds: float
    peak_memory: int


class _Quotable:
    """Paths that nvcc can pass to its shell. It writes ``\\'`` for a quote within double quotes,
    which is another path: a file or folder with one gets a link in the scratch folder."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._links: dict[Path, str] = {}

    def __call__(self, path: Path) -> str:
        if not re.search(r"['\"`$\\]", str(path)):
            return str(path)
        if path not in self._links:
            # Its own name at the end: an #include relative to a source is found beside it.
            folder = path if path.is_dir() else path.parent
            link = f"link{len(self._links)}_"
            (self._scratch / link).symlink_to(folder)
            self._links[path] = link if folder is path else f"{link}/{path.name}"
        return self._links[path]

    def named(self, ran: _Ran) -> _Ran:
        """The same run, with the real paths in its log."""
        log = ran.log
        for path, link in self._links.items():
            log = log.replace(link, str(path))
        return replace(ran, log=log)


def _run_nvcc(command: Sequence[str], scratch: Path, slot: int) -> _Ran:
    """Run nvcc in its scratch folder with TMPDIR ``.``: it passes the names of temporary files to a
    shell without quotes, so they must not contain the folder's."""
    started = time.perf_counter()
    log = scratch / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command,
            cwd=scratch,
            env={**os.environ, "TMPDIR": "."},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(slot,),
        ) as process,
    ):
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    return _Ran(
        status=process.returncode,
        log=log.read_text(errors="replace"),
        seconds=time.perf_counter() - started,
        peak_memory=usage.ru_maxrss * 1024,
    )


def _failure(backend: Backend, ran: _Ran) -> str:
    messages = "\n".join(line for line in ran.log.splitlines() if not line.startswith("ptxas info"))
    if ran.status in (-9, 137) or "signal 9" in messages or "Killed" in messages:
        return (
            f"the compiler of {backend.cuda.name} was killed at {ran.peak_memory / jobs.GIB:.1f} "
            "GiB, most likely out of memory: close other programs and re-run"
        )
    return f"nvcc cannot compile {backend.cuda}:\n{messages.strip()}"


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _last_report(backend: Backend) -> dict[str, Any]:
    """The newest report of a backend, of any version of its source; empty without one."""
    reports = _by_age(backend, ".json")
    with contextlib.suppress(IndexError, OSError, ValueError):
        return dict(json.loads(reports[-1].read_text()))
    return {}


def _by_age(backend: Backend, suffix: str) -> list[Path]:
    """Its files in the cache, the newest last."""
    found = paths.cache_dir().glob(f"{backend}-*{suffix}")
    return sorted(found, key=lambda path: path.stat().st_mtime)


def _code_flags(architectures: Iterable[str]) -> list[str]:
    numbers = [architecture.replace(".", "") for architecture in architectures]
    return [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]


def _report_path(library: Path) -> Path:
    return library.with_suffix(".json")


@contextmanager
def _lock(name: str, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of one backend; the operating system releases it when the holder dies."""
    path = paths.cache_dir() / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise _not_writable(path.parent, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _clear_scratch(name: str) -> None:
    """Remove the scratch folders of a backend whose lock is held: their compiles have ended."""
    for scratch in paths.cache_dir().glob(f"{name}-*.tmp"):
        shutil.rmtree(scratch, ignore_errors=True)


def _drop_old(backend: Backend) -> None:
    for path in _by_age(backend, ".so")[: -KEPT_LIBRARIES - 1]:
        path.unlink(missing_ok=True)
        _report_path(path).unlink(missing_ok=True)


def _not_writable(folder: Path, error: OSError) -> BuildError:
    return BuildError(
        f"cannot write compiled kernels to {folder} ({error.strerror or error}): make room or make "
        "it writable, or set CUSTOM_KERNELS_CACHE to another folder"
    )
