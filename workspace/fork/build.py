# SPDX-License-Identifier: Apache-2.0
"""`make fork-build`, `make dev BUILD=full`: vLLM's own C++ and CUDA, compiled from the tree.

Upstream's cmake build, with the cache variables that upstream's own preset generator sets, in a
build folder outside of the tree. Steps: see that the sources which it fetches can be had, configure
where something changed, compile what changed, install beside the tree, and move each file into it
by a rename. The manifest of the binaries says afterwards which of them are of one's own and from
which sources.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from workspace import verbs
from workspace.environment import cuda_home
from workspace.environment.inventory import headers
from workspace.fork import build_log, built_from, install, upstream_sources
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
"""What a compiler may take: of vLLM 0.25.1, scaled_mm_sm90_fp8.cu and cpu_attn.cpp at its peak."""


# --- what the machine allows ----------------------------------------------------------------------


def jobs(asked: int | None, device: Device, cores: int, gib: float) -> int:
    """Parallel compile jobs: JOBS=, else as many as the cores and the memory allow."""
    return asked or max(1, min(cores, int(gib / GIB_PER_JOB[device])))


def architectures(asked: str | None, device: Device) -> str:
    """CUDA_ARCHS=, else those of this machine's GPUs, as torch's cmake files take them."""
    if asked:
        names = re.split(r"[,; ]+", asked.strip(",; "))
        for name in names:
            if not re.fullmatch(r"\d+\.\d[af]?", name):
                raise WorkspaceError(
                    f"CUDA_ARCHS={asked}: {name!r} is not an architecture; give e.g. 9.0a or "
                    "8.0,9.0a"
                )
        return ";".join(names)
    if device == "cpu":
        # torch's cmake files ask for one; nothing is compiled for it.
        return load().cuda.architectures[0]
    names = sorted(set(gpus()))
    if not names:
        raise WorkspaceError(
            "there is no GPU here whose architecture could be taken; name it, e.g. CUDA_ARCHS=9.0a"
        )
    return ";".join(names)


def gpus() -> list[str]:
    """The architecture of each GPU; from Hopper on, the one with its special instructions."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    found = [pynvml.nvmlDeviceGetCudaComputeCapability(handle) for handle in handles]
    return [f"{major}.{minor}{'a' if major >= 9 else ''}" for major, minor in found]


# --- cmake's own part -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """The build of one release for one device: its folder, and how cmake is called in it."""

    place: Path
    device: Device
    folder: Path
    log: Path
    cache: dict[str, str]
    environment: dict[str, str]
    architectures: str
    launcher: str | None

    def configure(self) -> None:
        """Run cmake unless it ran to the end with all of this before."""
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        given = [f"-D{name}={value}" for name, value in self.cache.items()]
        place = plain(self.place.parent) / self.place.name
        arguments = ["-G", "Ninja", "-S", str(place), "-B", str(self.folder), *given, *extra]
        local = {name: self.environment.get(name) for name in self._variables()}
        files = [self.place / "CMakeLists.txt", *sorted((self.place / "cmake").rglob("*.cmake"))]
        texts = [install.checksum(path) for path in files]
        wanted = json.dumps([arguments, local, built_from.packages(), texts])
        stamp = self.folder / "configured.json"
        if stamp.exists() and stamp.read_text() == wanted:
            return
        stamp.unlink(missing_ok=True)
        # Asks cmake to write down which targets and components it made.
        write_file(self.folder / ".cmake/api/v1/query/codemodel-v2", b"")
        archs = f" {self.architectures.replace(';', ', ')}," if self.device == "cuda" else ""
        say(
            f"configuring vLLM's build for {self.device},{archs} "
            + (self.launcher or "no compiler cache (none of sccache, ccache is on PATH)")
        )
        self._cmake("configuring", *arguments)
        write_file(stamp, wanted.encode())

    def _variables(self) -> list[str]:
        found = upstream_sources.sources(self.place, self.device, platform.machine())
        return [source.variable for source in found]

    def targets(self) -> list[str]:
        """The extensions: what can be built and installed alone."""
        reply = self.folder / ".cmake/api/v1/reply"
        models = sorted(reply.glob("codemodel-v2-*.json"))
        if not models:
            raise WorkspaceError(
                f"cmake left no answer in {reply}; remove {self.folder}, run again"
            )
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
        self._cmake("compiling", *arguments, show_steps=True)

    def stage(self, target: str | None) -> Path:
        """Let cmake install into a folder beside the tree, where half a file does no harm."""
        stage = self.folder / "stage"
        shutil.rmtree(stage, ignore_errors=True)
        only = ["--component", target] if target else []
        self._cmake("installing", "--install", str(self.folder), "--prefix", str(stage), *only)
        return stage

    def _cmake(self, what: str, *arguments: str, show_steps: bool = False) -> None:
        command = ["cmake", *arguments]
        build_log.run(
            command,
            what=what,
            folder=self.folder,
            log=self.log,
            env=self.environment,
            show_steps=show_steps,
        )


def prepare(device: Device, archs: str | None) -> Build:
    """Everything that a build needs, or the first thing that is missing, before any of it runs."""
    from custom_kernels.compile import toolchain
    from custom_kernels.compile.toolchain import BuildError

    version, place = selected(), tree()
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
            f"vLLM {version} is compiled with CUDA {release}, and {tools.nvcc} is "
            f"{tools.nvcc_version}; set CUDA_HOME to a toolkit of that release"
        )
    # cmake hands paths on to nvcc, which cannot take them all.
    home, work = tools.nvcc.parents[1], plain(STATE)
    if tools.origin != "system":
        home = plain(MACHINE) / cuda_home.view(tools.nvcc, release, tools.cxx).name
    sources = Path(os.environ.get("FETCHCONTENT_BASE_DIR") or work / "sources" / version)
    local = upstream_sources.require(place, device, platform.machine(), sources)
    cache = {
        "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE") or "Release",
        "CMAKE_CXX_COMPILER": str(tools.cxx),
        "CMAKE_CUDA_COMPILER": f"{home}/bin/nvcc",
        "CMAKE_CUDA_HOST_COMPILER": str(tools.cxx),
        "CMAKE_INSTALL_PREFIX": str(place),
        "CUDA_TOOLKIT_ROOT_DIR": str(home),
        "FETCHCONTENT_BASE_DIR": str(sources),
        "NVCC_THREADS": os.environ.get("NVCC_THREADS") or "1",
        "TORCH_CUDA_ARCH_LIST": wanted,
        "VLLM_PYTHON_EXECUTABLE": sys.executable,
        "VLLM_PYTHON_PATH": os.pathsep.join(filter(None, sys.path)),
        "VLLM_TARGET_DEVICE": device,
    }
    # These are cmake's own, which reads them nowhere else.
    cache |= {name: path for name, path in local.items() if name.startswith("FETCHCONTENT_")}
    if include := headers():
        # cmake looks beside the interpreter, where a bare system has none.
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
    return Build(place, device, folder, log, cache, environment, wanted, launcher)


# --- into the tree --------------------------------------------------------------------------------


def move_into_tree(
    place: Path, stage: Path, build: dict[str, object], name: str, *, force: bool
) -> list[str]:
    """Put what cmake installed in place, each file by a rename; the names of those that changed.

    The manifest speaks of them first: killed in between, the next build finishes the work.

    Raises:
        WorkspaceError: one of them was edited by hand; without `force` nothing is replaced.
    """
    manifest = install.read_manifest()
    own: dict[str, dict[str, object]] = manifest.get("own", {})
    tracked = set(git("ls-files", "-z", tree=place).split("\0"))
    # Upstream links folders of Python files to a source of one's own; here they are copied.
    installed = {
        file: Path(folder) / leaf
        for folder, _, leaves in os.walk(stage / "vllm", followlinks=True)
        for leaf in leaves
        if (file := os.path.relpath(Path(folder) / leaf, stage)) not in tracked
        if not leaf.endswith(".pyc")
    }
    edited = install.edited(place, manifest, set(installed))
    if edited and not force:
        raise WorkspaceError(
            f"{edited[0]} in {shown(place)} was changed by hand ({len(edited)} such files), and "
            "the build would replace it; save it, then run this again with FORCE=1"
        )
    crcs = {file: install.checksum(path) for file, path in installed.items()}
    own |= {file: {"crc": crc, "build": name} for file, crc in crcs.items()}
    named = {str(entry["build"]) for entry in own.values()} | {name}
    builds = {key: value for key, value in manifest.get("builds", {}).items() if key in named}
    manifest |= {"own": own, "builds": builds | {name: build}, "unfinished": True}
    install.write_manifest(manifest)
    changed = []
    for file, source in installed.items():
        target = place / file
        if install.checksum(target) == crcs[file]:
            continue
        changed.append(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        try:
            shutil.copy2(source, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    install.hide_binaries(place, manifest)
    del manifest["unfinished"]
    install.write_manifest(manifest)
    built_from.forget(place, manifest)
    return changed


@contextlib.contextmanager
def rewritten_files(place: Path) -> Iterator[None]:
    """Enter into the manifest what upstream's configure writes over in the tree itself: it keeps
    FlashMLA's Python file there, which the wheel brought too."""

    def stamps() -> dict[str, tuple[int, int]]:
        paths = {name: place / name for name in install.read_manifest().get("files", {})}
        found = {name: path.stat() for name, path in paths.items() if path.exists()}
        return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in found.items()}

    before = stamps()
    try:
        yield
    finally:
        changed = [name for name, stamp in stamps().items() if before.get(name) != stamp]
        if changed:
            manifest = install.read_manifest()
            for name in changed:
                entry = {"crc": install.checksum(place / name), "build": "configure"}
                manifest.setdefault("own", {})[name] = entry
            install.write_manifest(manifest)


def run(device: Device, options: verbs.ForkBuild) -> None:
    """Compile what changed of TARGET=, or of everything, and put it into the tree.

    Raises:
        WorkspaceError: something is missing, a source cannot be had, cmake or a compiler failed.
            The tree's binaries are as they were.
    """
    from custom_kernels.compile.jobs import GIB, available  # installed a step ago

    build, target = prepare(device, options.cuda_archs), options.target
    cores, gib = len(os.sched_getaffinity(0)), available() / GIB
    number = jobs(options.jobs, device, cores, gib)
    with rewritten_files(build.place):
        build.configure()
        known = build.targets()
        if target and target not in known:
            names = ", ".join(known)
            raise WorkspaceError(f"TARGET={target} is not an extension; there are {names}")
        sources = built_from.record(build.place)
        memory = "" if options.jobs else f" ({cores} cores, {gib:.0f} GiB free)"
        what = target or ", ".join(known)
        say(f"compiling {what}, {number} at once{memory}; log: {build.log}")
        build.compile(target, number)
    if not target and (build.place / "rust").is_dir():
        say("vLLM's Rust parts stay the released wheel's; upstream's build_rust.sh compiles them")
    facts: dict[str, object] = {
        "sources": sources,
        "packages": built_from.packages(),
        "architectures": build.architectures if device == "cuda" else "",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    changed = move_into_tree(
        build.place, build.stage(target), facts, target or built_from.ALL, force=options.force
    )
    say(f"new in the tree: {', '.join(changed)}" if changed else "the tree is up to date")
