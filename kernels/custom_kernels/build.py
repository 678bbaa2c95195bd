# SPDX-License-Identifier: Apache-2.0
"""Compile ``<operation>/<backend>.cu`` into a plain shared library behind apache-tvm-ffi.

The name of a library holds the hash of everything that made it: the source and every file that it
includes from this package, the flags, the versions of nvcc, of the host compiler and of tvm-ffi,
the architectures. So "is it up to date" is "does this name exist", and nothing is ever rebuilt or
loaded by mistake. A library is written in a folder of its own and renamed when whole: a compile
that is killed leaves nothing that could be taken for a library, and the next one clears what it
left.

A source says what it needs in comments of its own:

- ``// link: cublasLt cublas``: libraries of the environment, beside the CUDA runtime;
- ``// include: cutlass``: headers that come with a package (CUTLASS lies in flashinfer-python);
- ``// architectures: 9.0a``: the only ones it is written for; without it, all that are pinned;
- ``// dtypes: bfloat16 float16``: the only ones it takes (see registry.takes).

A compile waits until the machine has a core and the memory for it (see jobs). How long it took and
the peak of its memory are kept in the report beside the library.

This module does not import torch: finding that there is nothing to do takes a fraction of a second.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from custom_kernels import jobs

if TYPE_CHECKING:
    import torch

PACKAGE = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = ("8.0", "9.0a", "10.0a", "12.0a")
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-cudart=none", "-Xptxas=-v")
LIBRARIES = ("cudart",)
PEAK_MEMORY = 5 * jobs.GIB // 2
"""Bytes that a compile may take at most; what one is taken to need before it was seen."""
REPORT = 2
"""Number of the form of the report beside a library; another one is compiled anew."""
KEPT_LIBRARIES = 8
"""How many older libraries of a backend stay in the cache, for going back and forth between
edits."""

_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_NEEDS = re.compile(r"^//\s*(link|include|architectures|dtypes):\s*(.+)$", re.MULTILINE)
_HEADER_PACKAGES = {
    "cutlass": (
        ("flashinfer", "data/cutlass/include", "flashinfer-python"),
        ("cutlass_library", "source/include", "nvidia-cutlass"),
    )
}
"""Where the headers that a source may ask for lie: (module, folder in it, package), in the order of
search."""
_NVCC_ENVIRONMENT = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")

log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """A kernel cannot be compiled. The message says why, with the compiler's own words where it has
    any."""


class NoCompiler(BuildError):
    """There is no nvcc, or none that goes with the environment's CUDA runtime."""


@dataclass(frozen=True)
class Source:
    """One ``.cu`` file: the compiled half of a backend."""

    operation: str
    backend: str
    path: Path

    @property
    def name(self) -> str:
        return f"{self.operation}.{self.backend}"

    def files(self) -> list[Path]:
        """The ``.cu`` and every file of this package that it includes, directly or not, sorted."""
        found: set[Path] = set()
        queue = [self.path]
        while queue:
            path = queue.pop()
            if path in found:
                continue
            found.add(path)
            for include in _INCLUDE.findall(path.read_text()):
                for folder in (path.parent, PACKAGE):
                    if (folder / include).is_file():
                        queue.append((folder / include).resolve())
                        break
        return sorted(found)

    def libraries(self) -> list[str]:
        """What it links with, from its ``// link:`` comments, and the CUDA runtime."""
        return [*LIBRARIES, *self._needs("link")]

    def dtypes(self) -> list[str]:
        """Names of the dtypes that it takes; none means all."""
        return self._needs("dtypes")

    def architectures(self, wanted: Iterable[str]) -> tuple[str, ...]:
        """Those of ``wanted`` that it is written for."""
        only = self._needs("architectures")
        return tuple(name for name in wanted if not only or name in only)

    def headers(self) -> list[tuple[Path, str]]:
        """Folder and package of the headers that it asks for. Raises BuildError if one is
        missing."""
        return [_headers(name) for name in self._needs("include")]

    def _needs(self, what: str) -> list[str]:
        found = _NEEDS.findall(self.path.read_text())
        return [name for kind, names in found if kind == what for name in names.split()]


@dataclass(frozen=True)
class Toolchain:
    """The compilers and where they come from."""

    nvcc: Path
    nvcc_version: str
    cxx: Path
    cxx_version: str
    tvm_ffi: Path
    tvm_ffi_version: str
    include: tuple[Path, ...]
    library: tuple[Path, ...]
    origin: str
    """``packages`` or ``conda`` for an environment's own nvcc, ``system`` for one from CUDA_HOME or
    PATH."""

    def versions(self) -> dict[str, str]:
        return {"nvcc": self.nvcc_version, "c++": self.cxx_version, "tvm-ffi": self.tvm_ffi_version}


@dataclass(frozen=True)
class Kernel:
    """What the assembler says of one kernel on one architecture: registers, and bytes per thread or
    block."""

    name: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    ptx: int | None = None
    """Instructions of its PTX."""
    threads: int | None = None
    """Threads in a block, where ``__launch_bounds__`` fixes it."""
    dynamic: bool = False
    """Whether it uses shared memory whose size the launch chooses, beyond ``shared``."""


@dataclass(frozen=True)
class Built:
    """One library in the cache."""

    source: Source
    path: Path
    architectures: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    compiled: bool
    """True if this call compiled it, False if it was up to date."""
    seconds: float
    """What this call took; next to nothing where the library was up to date."""
    peak_memory: int
    """Bytes that the largest process of its compile took."""


# --- what there is --------------------------------------------------------------------------------


def sources() -> list[Source]:
    """Every ``.cu`` in an operation's folder, sorted by name."""
    return [
        Source(path.parent.name, path.stem, path)
        for path in sorted(PACKAGE.glob("*/*.cu"))
        if (path.parent / "reference.py").is_file() and not path.stem.startswith("_")
    ]


def find(operation: str, backend: str) -> Source | None:
    """The source of a backend, None if it has no ``.cu``."""
    path = PACKAGE / operation / f"{backend}.cu"
    return Source(operation, backend, path) if path.is_file() else None


def source_hash() -> str:
    """sha256 over the names and contents of all sources in this package, for the provenance of a
    result."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in {".py", ".cu", ".cuh"}:
            digest.update(f"{path.relative_to(PACKAGE)}\0{_sha256(path)}\0".encode())
    return digest.hexdigest()


def checkout() -> Path | None:
    """The root of the checkout that this package lies in, None when it is installed elsewhere."""
    root = PACKAGE.parents[1]
    return root if (root / "pins.toml").is_file() else None


def cache_dir() -> Path:
    """Where compiled libraries live: ``$CUSTOM_KERNELS_CACHE``, the checkout's
    ``.workspace/kernels``, or the user's cache folder."""
    if configured := os.environ.get("CUSTOM_KERNELS_CACHE"):
        return Path(configured)
    if root := checkout():
        return root / ".workspace" / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "custom_kernels"


def pinned_architectures() -> tuple[str, ...]:
    """``[cuda] architectures`` of the checkout's pins.toml, or the default when there is none."""
    root = checkout()
    if root is None:
        return DEFAULT_ARCHITECTURES
    pins = tomllib.loads((root / "pins.toml").read_text())
    return tuple(pins.get("cuda", {}).get("architectures", DEFAULT_ARCHITECTURES))


def architecture(device: "torch.device") -> str:
    """The architecture to compile for on this device: ``9.0a`` on compute capability 9.0."""
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    # From Hopper on, the instructions that matter (wgmma, tcgen05) need the architecture-specific
    # target.
    return f"{major}.{minor}{'a' if major >= 9 else ''}"


# --- the tool chain -------------------------------------------------------------------------------


@functools.cache
def toolchain() -> Toolchain:
    """Find nvcc, the host compiler and tvm-ffi. Raises BuildError with the remedy if one is
    missing, NoCompiler if that is nvcc."""
    nvcc, origin = _find_nvcc()
    nvcc_version = _version([str(nvcc), "--version"], r"V(\d+\.\d+\.\d+)")
    runtime = packaged_runtime()
    if runtime and runtime.split(".")[0] != nvcc_version.split(".")[0]:
        raise NoCompiler(
            f"{nvcc} is of CUDA {nvcc_version}, this environment of {runtime}: "
            + _nvcc_remedy(runtime)
        )
    cxx = _find_cxx()
    tvm_ffi = importlib.util.find_spec("tvm_ffi")
    if tvm_ffi is None or not tvm_ffi.submodule_search_locations:
        raise BuildError(
            f"apache-tvm-ffi is not installed for {sys.executable}, and kernels cannot be compiled "
            "without its headers: run `make dev`, or install the package apache-tvm-ffi"
        )
    folders = _cuda_folders(nvcc)
    return Toolchain(
        nvcc=nvcc,
        nvcc_version=nvcc_version,
        cxx=cxx,
        cxx_version=_version([str(cxx), "--version"], r"(.+)"),
        tvm_ffi=Path(tvm_ffi.submodule_search_locations[0]),
        tvm_ffi_version=importlib.metadata.version("apache-tvm-ffi"),
        include=tuple(folder / "include" for folder in folders if (folder / "include").is_dir()),
        library=tuple(
            folder / lib
            for folder in folders
            for lib in ("lib", "lib64")
            if (folder / lib).is_dir()
        ),
        origin=origin,
    )


def include_folders() -> tuple[Path, ...]:
    """Folders of CUDA's headers, also where there is no nvcc; starts no process."""
    try:
        nvcc, _ = _find_nvcc()
    except BuildError:
        nvcc = None
    found = (folder / "include" for folder in _cuda_folders(nvcc))
    return tuple(dict.fromkeys(folder for folder in found if folder.is_dir()))


def _cuda_folders(nvcc: Path | None) -> list[Path]:
    """Where headers and libraries lie: in the packages, then beside nvcc."""
    home = [nvcc.parent.parent] if nvcc else []
    targets = [path for folder in home for path in folder.glob("targets/*-linux")]
    return [*_cuda_packages(), *targets, *home]


def _find_nvcc() -> tuple[Path, str]:
    """The environment's own nvcc (conda's, then the packages'), else the system's."""
    prefix = Path(sys.prefix)
    if (prefix / "conda-meta").is_dir() and (prefix / "bin" / "nvcc").is_file():
        return prefix / "bin" / "nvcc", "conda"
    for folder in _cuda_packages():
        if (folder / "bin" / "nvcc").is_file():
            return folder / "bin" / "nvcc", "packages"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        nvcc = Path(os.environ.get(variable) or "/nonexistent") / "bin" / "nvcc"
        if nvcc.is_file():
            return nvcc, "system"
    if found := shutil.which("nvcc"):
        return Path(found).resolve(), "system"
    raise NoCompiler(
        "there is no nvcc in this environment, under CUDA_HOME or on PATH: "
        + _nvcc_remedy(packaged_runtime())
    )


def _nvcc_remedy(runtime: str | None) -> str:
    if runtime and int(runtime.split(".")[0]) < 13:
        return (
            f"the packages of CUDA {runtime} hold none; set CUDA_HOME to a toolkit of that release "
            "or use ENV=conda"
        )
    return "run `make dev`, which installs the pinned one, or install the package nvidia-cuda-nvcc"


def _find_cxx() -> Path:
    prefix = Path(sys.prefix)
    names = [os.environ.get("CXX"), "x86_64-conda-linux-gnu-g++", "g++", "c++"]
    for name in filter(None, names):
        if (prefix / "conda-meta").is_dir() and (prefix / "bin" / name).is_file():
            return prefix / "bin" / name
        if found := shutil.which(name):
            return Path(found)
    raise BuildError(
        "there is no C++ compiler: install g++ (Debian, Ubuntu: `apt-get install g++`) or set CXX"
    )


def _cuda_packages() -> list[Path]:
    """Folders of CUDA's packages, in whichever of this interpreter's folders they are: nvidia/cu13
    and the one of cuSPARSELt; up to CUDA 12 one folder per component."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(name) for name in (spec.submodule_search_locations or [])] if spec else []
    if any((folder / "cu13").is_dir() for folder in folders):
        # In more than one of them where some come beside a host's own.
        found = [folder / part for folder in folders for part in ("cu13", "cusparselt")]
        return [path for path in found if path.is_dir()]
    parts = [part for folder in folders for part in sorted(folder.iterdir())]
    return [part for part in parts if (part / "include").is_dir() or (part / "lib").is_dir()]


def packaged_runtime() -> str | None:
    """The release of the CUDA runtime among the packages, for example ``12.8``; None where there is
    none."""
    for package in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return ".".join(importlib.metadata.version(package).split(".")[:2])
    return None


def header_packages() -> list[tuple[str, Path, str]]:
    """What sources ask for with ``// include:``: name, folder, package with version. Raises
    BuildError if one is missing."""
    names = sorted({name for source in sources() for name in source._needs("include")})
    return [(name, *_headers(name)) for name in names]


def _headers(name: str) -> tuple[Path, str]:
    if name not in _HEADER_PACKAGES:
        raise BuildError(
            f"`// include: {name}`: there is no such package of headers; there are "
            f"{', '.join(_HEADER_PACKAGES)}"
        )
    for module, inside, package in _HEADER_PACKAGES[name]:
        spec = importlib.util.find_spec(module)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / inside).is_dir():
                return Path(folder) / inside, f"{package} {importlib.metadata.version(package)}"
    if root := checkout():
        brought = root / ".workspace" / "headers" / name  # by a bundle, out of such a package
        if (brought / "include").is_dir():
            return brought / "include", (brought / "package").read_text().strip()
    packages = " or ".join(package for _, _, package in _HEADER_PACKAGES[name])
    raise BuildError(
        f"the headers of {name} are not installed for {sys.executable}: run `make dev`, or install "
        f"the package {packages}, which holds them"
    )


def _version(command: list[str], pattern: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(pattern, result.stdout)
    if result.returncode != 0 or match is None:
        raise BuildError(
            f"`{' '.join(command)}` failed: {(result.stderr or result.stdout).strip()}"
        )
    return match.group(1)


# --- compiling ------------------------------------------------------------------------------------


def build_all(
    architectures: Sequence[str] | None = None,
    force: bool = False,
    progress: Callable[[Built], None] | None = None,
    operation: str | None = None,
) -> list[Built]:
    """Bring every kernel (of ``operation``, if given) up to date for ``architectures`` (default:
    the pinned ones), in parallel; a source that is written for none of them is left out.

    ``progress`` is called with each library as it becomes ready. Raises BuildError, after all
    others are built, with the compiler's messages of those that failed.
    """
    architectures = tuple(architectures or pinned_architectures())
    remove_stale()
    wanted = [
        source
        for source in sources()
        if source.architectures(architectures) and operation in (None, source.operation)
    ]
    stale = [
        source for source in wanted if force or not library_path(source, architectures).is_file()
    ]
    done, errors = [], []
    for source in wanted:
        if source not in stale:
            done.append(build(source, architectures))
            if progress is not None:
                progress(done[-1])
    if not stale:
        return done

    from concurrent.futures import ThreadPoolExecutor, as_completed

    threads = max(1, len(os.sched_getaffinity(0)) // len(stale))
    with ThreadPoolExecutor(max_workers=len(stale)) as pool:
        # The one that took longest comes first, so that none is left alone at the end.
        stale.sort(key=lambda source: _last_report(source.name).get("seconds", 0), reverse=True)
        running = [pool.submit(build, source, architectures, force, threads) for source in stale]
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
    return sorted(done, key=lambda item: item.source.name)


def build(
    source: Source, architectures: Sequence[str], force: bool = False, threads: int = 0
) -> Built:
    """Bring one kernel up to date for ``architectures`` and return its library.

    ``threads`` compilers run at once for several architectures; 0: as many as there are cores. Two
    processes that want the same library at once compile it once: the second waits for the first.
    """
    started = time.perf_counter()
    architectures = source.architectures(architectures)
    path = library_path(source, architectures)
    compiled = False
    if force or not path.is_file():
        with _lock(source.name):
            if force or not path.is_file():
                _clear_scratch(source.name)
                threads = min(threads or len(os.sched_getaffinity(0)), len(architectures))
                _compile(source, architectures, path, threads)
                _drop_old(source.name)
                compiled = True
    report = json.loads(_report_path(path).read_text())
    kernels = tuple(Kernel(**item) for item in report["kernels"])
    seconds = time.perf_counter() - started
    return Built(
        source, path, architectures, kernels, compiled, seconds, int(report["peak_memory"])
    )


def library_path(source: Source, architectures: Sequence[str]) -> Path:
    """Where the library of ``source`` for ``architectures`` is, or will be once it is compiled."""
    tools = toolchain()
    architectures = source.architectures(architectures)
    recipe = {
        "report": REPORT,
        "headers": [package for _, package in source.headers()],
        "files": {str(path.relative_to(PACKAGE)): _sha256(path) for path in source.files()},
        "flags": [*FLAGS, *_code_flags(architectures)],
        "libraries": source.libraries(),
        "tools": tools.versions(),
        "environment": {name: os.environ.get(name, "") for name in _NVCC_ENVIRONMENT},
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return cache_dir() / f"{source.name}-{key[:20]}.so"


def remove_stale() -> None:
    """Remove what killed compiles left behind; compiles that are running keep theirs."""
    for scratch in cache_dir().glob("*.tmp"):
        name = scratch.name.split("-", 1)[0]
        with _lock(name, wait=False) as held:
            if held:
                _clear_scratch(name)


def unavailable(source: Source, device_architecture: str) -> str | None:
    """None if ``source`` is compiled, or can be, for the architecture; else the reason why not."""
    if not source.architectures((device_architecture,)):
        return f"{source.path.name} is not written for {device_architecture}"
    try:
        if existing(source, device_architecture) is None:
            toolchain()
    except BuildError as error:
        return str(error)
    return None


@functools.cache
def load(operation: str, backend: str, device: "torch.device | None" = None) -> Any:
    """Load a backend's library as a ``tvm_ffi.Module``; compile it first if it is not up to date.

    Any library that holds the device's architecture serves; one that must be compiled is compiled
    for this architecture alone. Without ``device`` (or on the CPU) it is the library for the pinned
    architectures.
    """
    # torch first: it brings the CUDA libraries, and a library that is loaded is not loaded twice.
    import torch
    import tvm_ffi

    source = find(operation, backend)
    if source is None:
        raise BuildError(f"{PACKAGE / operation} has no {backend}.cu")
    if device is None or torch.device(device).type != "cuda":
        path = build(source, pinned_architectures()).path
    else:
        target = architecture(torch.device(device))
        found = existing(source, target)
        if found is None:
            log.warning("compiling %s for %s: this happens once", source.name, target)
            found = build(source, (target,)).path
        path = found
    return tvm_ffi.load_module(str(path))


def existing(source: Source, device_architecture: str) -> Path | None:
    """A library that is up to date and holds the device's architecture."""
    for wanted in (pinned_architectures(), (device_architecture,)):
        architectures = source.architectures(wanted)
        if device_architecture in architectures:
            path = library_path(source, architectures)
            if path.is_file():
                return path
    return None


def _compile(source: Source, architectures: Sequence[str], path: Path, threads: int) -> None:
    tools = toolchain()
    if tools.origin == "system":
        _say_once(f"compiling with {tools.nvcc}, the system's: this environment holds no nvcc")
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f"{source.name}-", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise _not_writable(path.parent, error) from None
    try:
        quotable = _Quotable(scratch)
        headers = [*(folder for folder, _ in source.headers()), *tools.include]
        libraries = [_library(tools, name) for name in ("tvm_ffi", *source.libraries())]
        command = [
            str(tools.nvcc),
            *FLAGS,
            *_code_flags(architectures),
            f"--threads={threads}",
            "-shared",
            "-Xcompiler=-fPIC",
            f"-ccbin={quotable(tools.cxx)}",
            f"-I{quotable(PACKAGE)}",
            "-isystem",
            quotable(tools.tvm_ffi / "include"),
            *(item for folder in headers for item in ("-isystem", quotable(folder))),
            quotable(source.path),
            "-o",
            path.name,
            "--keep",  # the PTX, for the report; it goes when the scratch folder goes
            "--keep-dir=.",
            # Packages hold only lib<name>.so.<major>, without the plain link name. The result asks
            # for it by the name that is written in it, which is the one that torch has loaded.
            *(f"-L{quotable(library.parent)}" for library in libraries),
            *(f"-l:{library.name}" for library in libraries),
        ]
        need = _last_report(source.name).get("peak_memory") or PEAK_MEMORY
        with jobs.slot(need * threads) as slot:
            ran = quotable.named(_run_nvcc(command, scratch, slot.fileno()))
        if ran.status != 0:
            raise BuildError(_failure(source, ran))
        if library_path(source, architectures) != path:
            raise BuildError(f"{source.path} changed while it was compiled: run the same again")
        report = {
            "source": source.name,
            "architectures": list(architectures),
            "tools": tools.versions(),
            "seconds": round(ran.seconds, 1),
            "peak_memory": ran.peak_memory,
            "kernels": [asdict(kernel) for kernel in _kernels(ran.log, scratch)],
        }
        # The report first: where there is a library, there is its report.
        output, report_output = scratch / path.name, scratch / "report.json"
        report_output.write_text(json.dumps(report, indent=1))
        for written in (output, report_output):
            with written.open("rb") as file:
                os.fsync(file.fileno())
        report_output.replace(_report_path(path))
        output.replace(path)
    except OSError as error:
        raise _not_writable(path.parent, error) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class _Ran:
    """One run of nvcc; the memory is that of the largest of its processes."""

    status: int
    log: str
    seconds: float
    peak_memory: int


class _Quotable:
    """Paths as nvcc can pass them on. It writes ``\\'`` for a quote within double quotes, which is
    another path: a file or folder with one gets a link in the scratch folder."""

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
        """What nvcc said, with the paths as everybody knows them."""
        log = ran.log
        for path, link in self._links.items():
            log = log.replace(link, str(path))
        return replace(ran, log=log)


def _run_nvcc(command: Sequence[str], scratch: Path, slot: int) -> _Ran:
    """Run nvcc in its scratch folder, which it knows as ``.``: it hands its temporary files to a
    shell without quotes, so their names must not hold the folder's own."""
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


def _failure(source: Source, ran: _Ran) -> str:
    messages = "\n".join(line for line in ran.log.splitlines() if not line.startswith("ptxas info"))
    if ran.status in (-9, 137) or "signal 9" in messages or "Killed" in messages:
        return (
            f"the compiler of {source.path.name} was killed at {ran.peak_memory / jobs.GIB:.1f} "
            "GiB, most likely for want of memory: end other programs and run the same again"
        )
    return f"nvcc cannot compile {source.path}:\n{messages.strip()}"


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)


def _last_report(name: str) -> dict[str, Any]:
    """The newest report of a source, whatever version of it that was; empty where there is none."""
    found = sorted(cache_dir().glob(f"{name}-*.json"), key=lambda path: path.stat().st_mtime)
    with contextlib.suppress(IndexError, OSError, ValueError):
        return dict(json.loads(found[-1].read_text()))
    return {}


def _code_flags(architectures: Iterable[str]) -> list[str]:
    numbers = [architecture.replace(".", "") for architecture in architectures]
    return [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]


def _library(tools: Toolchain, name: str) -> Path:
    """The file of a shared library that a source asks for, or of apache-tvm-ffi."""
    folders = (tools.tvm_ffi / "lib", *tools.library)
    for folder in folders:
        for candidate in [*sorted(folder.glob(f"lib{name}.so.*")), folder / f"lib{name}.so"]:
            if candidate.is_file():
                return candidate
    searched = ", ".join(map(str, folders))
    raise BuildError(f"the library {name!r} is in none of {searched}: run `make dev`")


def _report_path(library: Path) -> Path:
    return library.with_suffix(".json")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _lock(name: str, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of one backend; the operating system releases it when its holder dies."""
    path = cache_dir() / f"{name}.lock"
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
    """Remove the temporary folders of a backend whose lock we hold: whoever made them is gone."""
    for scratch in cache_dir().glob(f"{name}-*.tmp"):
        shutil.rmtree(scratch, ignore_errors=True)


def _drop_old(name: str) -> None:
    libraries = sorted(cache_dir().glob(f"{name}-*.so"), key=lambda path: path.stat().st_mtime)
    for path in libraries[: -KEPT_LIBRARIES - 1]:
        path.unlink(missing_ok=True)
        _report_path(path).unlink(missing_ok=True)


def _not_writable(folder: Path, error: OSError) -> BuildError:
    return BuildError(
        f"cannot write compiled kernels to {folder} ({error.strerror or error}): make room or make "
        "it writable, or set CUSTOM_KERNELS_CACHE to another folder"
    )


# --- what the assembler says ----------------------------------------------------------------------

_ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)' for 'sm_(?P<sm>\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def _kernels(log: str, kept: Path) -> list[Kernel]:
    """What ptxas says in ``log``, with what the PTX in the folder ``kept`` says beside it."""
    from custom_kernels import assembly

    entries = {}
    for path in kept.glob("*.ptx"):
        text = path.read_text()
        if target := re.search(r"^\.target sm_(\w+)", text, re.MULTILINE):
            for entry in assembly.entries(text):
                entries[entry.name, _architecture_name(target[1])] = entry
    kernels = parse_ptxas(log)
    for index, kernel in enumerate(kernels):
        said = entries.get((kernel.name, kernel.architecture))
        if said is not None:
            kernels[index] = replace(
                kernel, ptx=said.instructions, threads=said.threads, dynamic=said.dynamic
            )
    names = assembly.demangle([kernel.name for kernel in kernels])
    return [replace(kernel, name=name) for kernel, name in zip(kernels, names, strict=True)]


def _architecture_name(sm: str) -> str:
    number = re.fullmatch(r"(\d+)(\d)(\w?)", sm)
    return f"{number[1]}.{number[2]}{number[3]}" if number else sm


def parse_ptxas(text: str) -> list[Kernel]:
    """Read ``ptxas -v``: an entry line, a line on stack and spills, a line on registers and shared
    memory."""
    kernels: list[Kernel] = []
    entry: dict[str, str] | None = None
    memory = (0, 0, 0)
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            entry = match.groupdict()
        elif match := _SPILLS.search(line):
            memory = (int(match[1]), int(match[2]), int(match[3]))
        elif entry is not None and (match := _USED.search(line)):
            shared = _SHARED.search(line)
            kernels.append(
                Kernel(
                    entry["name"],
                    _architecture_name(entry["sm"]),
                    int(match["registers"]),
                    *memory,
                    int(shared[1]) if shared else 0,
                )
            )
            entry = None
    return kernels


def main() -> int:
    """``python -m custom_kernels.build``: compile what changed, print a line per kernel."""
    parser = argparse.ArgumentParser(
        prog="python -m custom_kernels.build", description=main.__doc__
    )
    parser.add_argument(
        "--arch", action="append", help="for example 9.0a; repeatable (default: the pinned)"
    )
    parser.add_argument("--force", action="store_true", help="compile even what is up to date")
    arguments = parser.parse_args()

    def show(built: Built) -> None:
        state = "up to date"
        if built.compiled:
            state = f"compiled in {built.seconds:.1f} s, {built.peak_memory / jobs.GIB:.1f} GiB"
        print(f"{built.source.name}: {state} for {', '.join(built.architectures)}")
        for kernel in built.kernels:
            spills = kernel.spill_stores + kernel.spill_loads
            print(
                f"  {kernel.name} on {kernel.architecture}: {kernel.registers} registers, "
                f"{kernel.shared} B shared, {spills} B spilled"
            )

    try:
        build_all(arguments.arch, arguments.force, show)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
