# SPDX-License-Identifier: Apache-2.0
"""`make fork-build`, `make dev BUILD=full`: compile vLLM's C++ and CUDA from the tree.

Upstream's cmake build, with the cache variables that upstream's preset generator sets, in a build
folder outside of the tree. Steps: check that the sources which it fetches are available, configure
if something changed, compile what changed, install into a staging folder, and move each file into
the tree by a rename. The manifest records which binaries were built locally, from which sources.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from workspace import verbs
from workspace.environment import cuda_home
from workspace.environment.inventory import headers
from workspace.fork import build_log, built_from, install, upstream_sources
from workspace.fork.built_from import BuiltFile
from workspace.fork.tree_state import shown
from workspace.host.errors import WorkspaceError
from workspace.host.files import write_file
from workspace.host.git import fetching, git
from workspace.host.paths import MACHINE, STATE
from workspace.host.plain_path import plain
from workspace.host.text import say
from workspace.pins.model import Device, load
from workspace.pins.release import selected, tree

LAUNCHERS = ("sccache", "ccache")
GIB_PER_JOB = {"cuda": 8.5, "cpu": 2.0}
"""Peak memory of a compiler on vLLM 0.25.1: of scaled_mm_sm90_fp8.cu and cpu_attn.cpp."""


# --- this machine ---------------------------------------------------------------------------------


def jobs(requested: int | None, device: Device, cores: int, gib: float) -> int:
    """Parallel compile jobs: JOBS=, else as many as cores and memory allow."""
    return requested or max(1, min(cores, int(gib / GIB_PER_JOB[device])))


def architectures(requested: str | None, device: Device) -> str:
    """CUDA_ARCHS=, else those of this machine's GPUs, in the format of TORCH_CUDA_ARCH_LIST."""
    if requested:
        names = re.split(r"[,; ]+", requested.strip(",; "))
        for name in names:
            if not re.fullmatch(r"\d+\.\d[af]?", name):
                raise WorkspaceError(
                    f"CUDA_ARCHS={requested}: {name!r} is not an architecture; use e.g. 9.0a or "
                    "8.0,9.0a"
                )
    elif device == "cpu":
        # torch's cmake files require one; nothing is compiled for it.
        names = load().cuda.architectures[:1]
    else:
        names = sorted(set(gpus()))
        if not names:
            raise WorkspaceError("no GPU on this machine; name the architecture: CUDA_ARCHS=9.0a")
    return ";".join(names)


def gpus() -> list[str]:
    """The architecture of each GPU; from Hopper on with its architecture-specific features."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    capabilities = map(pynvml.nvmlDeviceGetCudaComputeCapability, handles)
    return [f"{major}.{minor}{'a' if major >= 9 else ''}" for major, minor in capabilities]


# --- cmake ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """The build of one release for one device: its folders, and how cmake is called."""

    tree: Path
    device: Device
    folder: Path
    log: Path
    cache: dict[str, str]
    environment: dict[str, str]
    architectures: str
    launcher: str | None

    def configure(self) -> None:
        """Run cmake, unless it succeeded before with the same inputs."""
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        cache = [f"-D{name}={value}" for name, value in self.cache.items()]
        source = plain(self.tree.parent) / self.tree.name
        arguments = ["-G", "Ninja", "-S", str(source), "-B", str(self.folder), *cache, *extra]
        fetched = upstream_sources.sources(self.tree, self.device, platform.machine())
        local = {entry.variable: self.environment.get(entry.variable) for entry in fetched}
        files = [self.tree / "CMakeLists.txt", *sorted((self.tree / "cmake").rglob("*.cmake"))]
        checksums = [install.checksum(path) for path in files]
        inputs = json.dumps([arguments, local, built_from.packages(), checksums])
        stamp = self.folder / "configured.json"
        if stamp.exists() and stamp.read_text() == inputs:
            return
        stamp.unlink(missing_ok=True)
        # In it values of CMAKE_ARGS would outlive CMAKE_ARGS. Compiled files stay: ninja compares
        # their commands.
        (self.folder / "CMakeCache.txt").unlink(missing_ok=True)
        # Requests a file with the targets and components, see `targets`.
        write_file(self.folder / ".cmake/api/v1/query/codemodel-v2", b"")
        archs = f" {self.architectures.replace(';', ', ')}," if self.device == "cuda" else ""
        say(
            f"configuring vLLM's build for {self.device},{archs} "
            + (self.launcher or "no compiler cache (neither sccache nor ccache is on PATH)")
        )
        self._cmake("configuring", *arguments)
        write_file(stamp, inputs.encode())

    def targets(self) -> list[str]:
        """The extensions, which can be built and installed separately."""
        reply = self.folder / ".cmake/api/v1/reply"
        models = sorted(reply.glob("codemodel-v2-*.json"))
        if not models:
            raise WorkspaceError(f"cmake wrote no reply in {reply}; remove {self.folder}, re-run")
        (model,) = json.loads(models[-1].read_text())["configurations"]
        components = {
            installer.get("component")
            for folder in model["directories"]
            for installer in json.loads((reply / folder["jsonFile"]).read_text())["installers"]
        }
        return sorted({target["name"] for target in model["targets"]} & components)

    def compile(self, target: str | None, count: int) -> None:
        only = ["--target", target] if target else []
        arguments = ["--build", str(self.folder), "-j", str(count), *only]
        self._cmake("compiling", *arguments, jobs=count)

    def stage(self, target: str | None) -> Path:
        """Let cmake install into a staging folder, where an incomplete file does no harm."""
        stage = self.folder / "stage"
        shutil.rmtree(stage, ignore_errors=True)
        only = ["--component", target] if target else []
        self._cmake("installing", "--install", str(self.folder), "--prefix", str(stage), *only)
        return stage

    def _cmake(self, what: str, *arguments: str, jobs: int = 0) -> None:
        build_log.run(
            ["cmake", *arguments],
            what=what,
            folder=self.folder,
            log=self.log,
            env=self.environment,
            jobs=jobs,
        )


def require_libnuma(tree: Path, cxx: str) -> None:
    """Compile and link a line with libnuma, which upstream's cmake files use without looking for.

    Raises:
        WorkspaceError: they do so and the system has no libnuma to compile with; else the build
            would fail after the sources that come first, on two cores after half an hour.
    """
    listed = tree / "cmake" / "cpu_extension.cmake"
    if not listed.exists() or not re.search(r"\bLIBS\b.*\bnuma\b", listed.read_text()):
        return
    probe = [cxx, "-x", "c++", "-", "-shared", "-lnuma", "-o", os.devnull]
    result = subprocess.run(probe, input=b"#include <numa.h>\n", capture_output=True, check=False)
    if result.returncode:
        raise WorkspaceError(
            f"vLLM's CPU build needs libnuma's header, which {cxx} does not find; install your "
            "distribution's libnuma-dev (Debian, Ubuntu: apt-get install it)"
        )


def prepare(device: Device, archs: str | None) -> Build:
    """Collect the inputs of a build.

    Raises:
        WorkspaceError: the first one that is missing.
    """
    from custom_kernels.compile import toolchain
    from custom_kernels.compile.toolchain import BuildError

    version, source = selected(), tree()
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            raise WorkspaceError(f"{tool} is missing; run: make dev, or install it")
    try:
        tools = toolchain.find()
    except BuildError as error:
        raise WorkspaceError(str(error)) from None
    wanted, release = architectures(archs, device), load().release().cuda.release
    if tools.nvcc_version.partition(".")[0] != release.partition(".")[0]:
        raise WorkspaceError(
            f"vLLM {version} needs CUDA {release}, but {tools.nvcc} is {tools.nvcc_version}; set "
            "CUDA_HOME to a toolkit of that release"
        )
    # cmake passes paths to nvcc, which fails with special characters in them.
    home, work = tools.nvcc.parents[1], plain(STATE)
    if tools.origin != "system":
        home = plain(MACHINE) / cuda_home.view(tools.nvcc, release, tools.cxx).name
    sources = Path(os.environ.get("FETCHCONTENT_BASE_DIR") or work / "sources" / version)
    if device == "cpu":
        require_libnuma(source, str(tools.cxx))
    local = upstream_sources.require(source, device, platform.machine(), sources)
    cache = {
        "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE") or "Release",
        "CMAKE_CXX_COMPILER": str(tools.cxx),
        "CMAKE_CUDA_COMPILER": f"{home}/bin/nvcc",
        "CMAKE_CUDA_HOST_COMPILER": str(tools.cxx),
        "CMAKE_INSTALL_PREFIX": str(source),
        "CUDA_TOOLKIT_ROOT_DIR": str(home),
        "FETCHCONTENT_BASE_DIR": str(sources),
        "NVCC_THREADS": os.environ.get("NVCC_THREADS") or "1",
        "TORCH_CUDA_ARCH_LIST": wanted,
        "VLLM_PYTHON_EXECUTABLE": sys.executable,
        "VLLM_PYTHON_PATH": os.pathsep.join(filter(None, sys.path)),
        "VLLM_TARGET_DEVICE": device,
    }
    # cmake reads these from its cache only, not from the environment.
    cache |= {name: path for name, path in local.items() if name.startswith("FETCHCONTENT_")}
    if include := headers():
        # cmake searches only beside the interpreter.
        cache["Python_INCLUDE_DIR"] = include
    launcher = next(filter(shutil.which, LAUNCHERS), None)
    for language in ("C", "CXX", "CUDA") if launcher else ():
        cache[f"CMAKE_{language}_COMPILER_LAUNCHER"] = str(launcher)
    environment = {
        **os.environ,
        **fetching(),
        **local,
        "CUDA_HOME": str(home),
        "PATH": os.pathsep.join([f"{home}/bin", os.environ["PATH"]]),
        "TORCH_CUDA_ARCH_LIST": wanted,
    }
    log = STATE / "logs" / f"fork-build-{version}-{device}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    folder = work / "build" / f"{version}-{device}"
    return Build(source, device, folder, log, cache, environment, wanted, launcher)


# --- into the tree --------------------------------------------------------------------------------


def move_into_tree(
    tree: Path, stage: Path, build: built_from.Build, name: str, *, force: bool
) -> list[str]:
    """Move the files that cmake installed into `stage` to the tree, each by a rename.

    The manifest is written first: after a kill, the next build finishes the work.

    Returns:
        The names of the files that changed.

    Raises:
        WorkspaceError: a file was edited by hand, and not `force`; nothing was replaced.
    """
    manifest = built_from.read_manifest()
    tracked = set(git("ls-files", "-z", tree=tree).split("\0"))
    # Upstream links folders of Python files to a local source; here they are copied.
    installed = {
        file: Path(folder) / leaf
        for folder, _, leaves in os.walk(stage / "vllm", followlinks=True)
        for leaf in leaves
        if (file := os.path.relpath(Path(folder) / leaf, stage)) not in tracked
        if not leaf.endswith(".pyc")
    }
    edited = install.edited(tree, manifest, installed)
    if edited and not force:
        raise WorkspaceError(
            f"{edited[0]} in {shown(tree)} was changed by hand ({len(edited)} such files), and "
            "the build would replace it; save it, then re-run with FORCE=1"
        )
    crcs = {file: install.checksum(path) for file, path in installed.items()}
    manifest.own |= {file: BuiltFile(crc=crc, build=name) for file, crc in crcs.items()}
    used = {file.build for file in manifest.own.values()}
    manifest.builds = {key: value for key, value in manifest.builds.items() if key in used}
    manifest.builds[name] = build
    manifest.unfinished = True
    built_from.write_manifest(manifest)
    changed = [file for file in installed if install.checksum(tree / file) != crcs[file]]
    for file in changed:
        target = tree / file
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        try:
            shutil.copy2(installed[file], partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    install.exclude_binaries(tree, manifest)
    manifest.unfinished = False
    built_from.write_manifest(manifest)
    built_from.remove_unused(tree, manifest)
    return changed


@contextlib.contextmanager
def record_rewritten_files(tree: Path) -> Iterator[None]:
    """Record in the manifest files of the wheel that upstream's configure overwrites in the tree,
    such as a Python file of FlashMLA."""

    def stamps() -> dict[str, tuple[int, int]]:
        paths = {name: tree / name for name in built_from.read_manifest().files}
        stats = {name: path.stat() for name, path in paths.items() if path.exists()}
        return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}

    before = stamps()
    try:
        yield
    finally:
        changed = [name for name, stamp in stamps().items() if before.get(name) != stamp]
        if changed:
            manifest = built_from.read_manifest()
            for name in changed:
                crc = install.checksum(tree / name)
                manifest.own[name] = BuiltFile(crc=crc, build="configure")
            built_from.write_manifest(manifest)


def run(device: Device, options: verbs.ForkBuild) -> None:
    """Compile what changed of TARGET=, or of everything, and move it into the tree.

    Raises:
        WorkspaceError: something is missing, a source is not available, cmake or a compiler failed.
            The binaries in the tree are unchanged.
    """
    from custom_kernels.compile.jobs import GIB, available  # installed by the step before

    build, target = prepare(device, options.cuda_archs), options.target
    cores, gib = len(os.sched_getaffinity(0)), available() / GIB
    number = jobs(options.jobs, device, cores, gib)
    with record_rewritten_files(build.tree):
        build.configure()
        known = build.targets()
        names = ", ".join(known)
        if target and target not in known:
            raise WorkspaceError(f"TARGET={target} is not an extension; use one of {names}")
        sources = built_from.record(build.tree)
        memory = "" if options.jobs else f" ({cores} cores, {gib:.0f} GiB free)"
        say(f"compiling {target or names}, {number} jobs{memory}; log: {build.log}")
        build.compile(target, number)
    if not target and (build.tree / "rust").is_dir():
        say("vLLM's Rust parts stay the released wheel's; upstream's build_rust.sh compiles them")
    record = built_from.Build(
        sources=sources,
        packages=built_from.packages(),
        architectures=build.architectures if device == "cuda" else "",
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    changed = move_into_tree(
        build.tree, build.stage(target), record, target or built_from.ALL, force=options.force
    )
    say(f"new in the tree: {', '.join(changed)}" if changed else "the tree is up to date")
