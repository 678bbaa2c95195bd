# SPDX-License-Identifier: Apache-2.0
"""A small checkout: the real tools on small inputs.

The whole of `make dev` in seconds: our own code and kernels, a lock cut down to what setting
up needs, and a "vLLM" release of a few files with the layout of the real one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from workspace import doctor
from workspace.environment import lock
from workspace.host import settings, setup_lock
from workspace.host.paths import KERNELS, LOCKS, MACHINE, ROOT
from workspace.pins.model import load
from workspace.pins.release import selected

# A port that is taken and on which nobody listens: whoever asks there is refused at once.
_held = socket.socket()
_held.bind(("127.0.0.1", 0))
NOBODY = f"http://127.0.0.1:{_held.getsockname()[1]}"
UNREACHABLE = f"{NOBODY}/numbers.git"
SOURCES = {
    "setup.py": (
        "import os\nfrom setuptools import setup\n"
        "setup(packages=['vllm'], version=os.environ['VLLM_VERSION_OVERRIDE'])\n"
    ),
    "pyproject.toml": (
        "[build-system]\nrequires = ['setuptools']\nbuild-backend = 'setuptools.build_meta'\n"
        "[project]\nname = 'vllm'\ndynamic = ['version']\n"
    ),
    ".gitignore": "__pycache__/\n",
    "vllm/__init__.py": "VALUE = 1\n",
    "vllm/envs.py": "first = 1\nsecond = 2\nthird = 3\n",
    "vllm/kept.py": "untouched = True\n",
    "vllm/_version.py": "__version__ = '0.25.1'\n",
    "PKG-INFO": "Name: vllm\n",
    "CMakeLists.txt": """\
cmake_minimum_required(VERSION 3.26)
project(small LANGUAGES CXX)
string(REPLACE "." "" CMAKE_CUDA_ARCHITECTURES "${TORCH_CUDA_ARCH_LIST}")
enable_language(CUDA)
if(VLLM_TARGET_DEVICE STREQUAL "cpu")
  include(cmake/cpu_extension.cmake)
endif()
add_library(_C MODULE csrc/first.cpp csrc/second.cpp)
add_library(_moe_C MODULE csrc/moe.cu)
foreach(name _C _moe_C)
  set_target_properties(${name} PROPERTIES PREFIX "" SUFFIX ".abi3.so")
  target_include_directories(${name} PRIVATE ${numbers_SOURCE_DIR})
  install(TARGETS ${name} LIBRARY DESTINATION vllm COMPONENT ${name})
endforeach()
""",
    "cmake/cpu_extension.cmake": f"""\
include(FetchContent)
if(DEFINED ENV{{NUMBERS_SRC_DIR}})
  FetchContent_Declare(numbers SOURCE_DIR $ENV{{NUMBERS_SRC_DIR}})
else()
  # Nobody answers there, unless a test has git look elsewhere.
  FetchContent_Declare(numbers
    GIT_REPOSITORY {UNREACHABLE}
    GIT_TAG one)
endif()
FetchContent_MakeAvailable(numbers)
""",
    "csrc/first.cpp": '#include "numbers.h"\nextern "C" int first() { return ONE; }\n',
    "csrc/second.cpp": 'extern "C" int second() { return 2; }\n',
    "csrc/moe.cu": (
        "__global__ void kernel(int *out) { *out = 3; }\n"
        'extern "C" int third() { return kernel == nullptr ? 0 : 3; }\n'
    ),
    "rust/lib.rs": "fn main() {}\n",
    "tools/start.bat": "@echo off\r\nrem\ttwo \r\n",
}
ODD = Path("my work (1) ü", "it's here")
"""Small checkouts lie in a folder with such a name: what fails there fails for a user."""
# Another release, like the default one but for these sources.
OLD = load().vllm.default
NEW = "0.99.0"
CHANGED = {
    **SOURCES,
    "vllm/envs.py": "zeroth = 0\nfirst = 1\nsecond = 2\nthird = 3\nfourth = 4\n",
    "vllm/kept.py": "untouched = 'another'\n",
    "vllm/new_in_this_release.py": "x = 1\n",
}
BINARIES = {
    "vllm/_C.abi3.so": b"\x7fELF not really" * 5000,
    "vllm/_C_AVX2.abi3.so": b"\x7fELF neither" * 5000,
    "vllm/third_party/made/__init__.py": b"made = True\n",
}


KILLS = int(os.environ.get("KILLS", "2"))
"""How often each test of being killed at random moments tries; KILLS=40 tries harder."""
SMALL_BENCH = ("INPUT_LEN=16", "OUTPUT_LEN=8", "NUM_PROMPTS=4", "REPEATS=1", "ROUNDS=1")
"""`make bench` with as little as a record can hold."""

# The interpreter that this environment was made with: like a user's, it may have pip.
BASE_PYTHON: str = getattr(sys, "_base_executable", sys.executable)


def blob(text: str) -> str:
    """Git's name for a file with this content."""
    content = text.encode()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# With a library's headers, and without tvm-ffi's, so that it compiles in a second or two.
KERNEL = """\
// link: cublasLt cublas
#include <cublasLt.h>
#include <cuda_runtime.h>
extern "C" __global__ void scale(float *x) { *x *= 2; }
"""
PATCHED = SOURCES["vllm/envs.py"].replace("second", "added = True\nsecond")
PATCH = f"""\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: A Maintainer <maintainer@example.invalid>
Date: Mon, 23 Nov 2026 09:00:00 +0000
Subject: [PATCH] Add a line

Because a test wants one.
---
diff --git a/vllm/envs.py b/vllm/envs.py
index {blob(SOURCES["vllm/envs.py"])}..{blob(PATCHED)} 100644
--- a/vllm/envs.py
+++ b/vllm/envs.py
@@ -1,0 +2,1 @@
+added = True
--
"""
ROOTS = [
    *("typer", "rich", "pydantic", "filelock", "pypi-simple", "requests", "packaging"),
    *("setuptools", "wheel", "apache-tvm-ffi", "nvidia-cuda-nvcc", "nvidia-cuda-crt"),
    *("nvidia-nvvm", "nvidia-cuda-cccl", "nvidia-cuda-runtime", "nvidia-cublas", "nvidia-ml-py"),
    *("cmake", "ninja"),
]


def sdist_bytes(files: dict[str, str], folder: str = "vllm-0.25.1") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size, entry.mode = len(text.encode()), 0o644
            # A user that every Debian has and that is not the one who runs this.
            entry.uname, entry.gname, entry.uid, entry.gid = "games", "games", 5, 60
            archive.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


def wheel_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def closure(roots: list[str]) -> set[str]:
    """The distributions that `roots` need here, themselves included."""
    found: set[str] = set()
    queue = list(roots)
    while queue:
        name = canonicalize_name(queue.pop())
        if name in found:
            continue
        found.add(name)
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return found


@dataclass
class Checkout:
    """A checkout in a folder of its own, with its own cache and environment."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def src(self) -> Path:
        """The link to the active release's tree."""
        return self.root / "vllm-fork" / "src"

    def tree(self, version: str) -> Path:
        return self.root / "vllm-fork" / "releases" / version

    @property
    def python(self) -> Path:
        return self.root / ".venv" / "bin" / "python"

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["make", "--no-print-directory", *arguments],
            cwd=self.root,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def make(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run make; standard output and error come back as one text."""
        process = self.start(*arguments, **env)
        output, _ = process.communicate()
        return subprocess.CompletedProcess(arguments, process.returncode, output, "")

    def git(self, *arguments: str) -> str:
        command = ["git", "-c", "user.name=U", "-c", "user.email=u@example.invalid", *arguments]
        result = subprocess.run(
            command, cwd=self.src, capture_output=True, text=True, check=True, env=self.env
        )
        return result.stdout.strip()


def pinned(text: str, path: str, sha256: str) -> str:
    """pins.toml with the sha256 under a heading replaced."""
    heading = re.escape(f'[vllm.release."{load().vllm.default}".{path}]')
    return re.sub(rf'({heading}\n(?:.+\n)*?sha256 = )"\w+"', rf'\1"{sha256}"', text)


@pytest.fixture(scope="session")
def doctors_rows() -> list[doctor.Check]:
    """What `make doctor` says of this checkout."""
    return doctor.checks(settings.current().mode)


@pytest.fixture(scope="session")
def _small_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if selected() != load().vllm.default:
        pytest.skip("the small checkout has the default release's packages, this environment not")
    return make_template(tmp_path_factory.mktemp("template"))


def make_template(folder: Path) -> Path:
    """What small checkouts are copies of; their cache lies beside it."""
    root = folder / ODD / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "workspace", root / "workspace", ignore=ignore)
    # One small kernel is enough to compile; the small lock lacks what the others link with.
    operations = {path.parent.name for path in (KERNELS / "custom_kernels").glob("*/reference.py")}
    others = shutil.ignore_patterns(
        "__pycache__", "*.egg-info", "skinny.cu", *(operations - {"gemm"})
    )
    shutil.copytree(KERNELS, root / "kernels", ignore=others)
    (root / "kernels/custom_kernels/gemm/cublaslt.cu").write_text(KERNEL)
    shutil.copy(ROOT / "Makefile", root)
    shutil.copy(ROOT / ".gitignore", root)
    version = load().vllm.default
    release = load().release()
    patches = root / "vllm-fork" / "patches" / version
    patches.mkdir(parents=True)
    (patches / "0001-add-a-line.patch").write_text(PATCH)

    cache = root.parent / "cache"
    pins = (ROOT / "pins.toml").read_text()
    pins = re.sub(r'^tree = ".*?"', 'tree = ""', pins, flags=re.MULTILINE)
    pins = re.sub(r"^architectures = .*", 'architectures = ["9.0a"]', pins, flags=re.MULTILINE)
    machine = os.uname().machine
    for path, artifact, content in (
        ("sdist", release.sdist, sdist_bytes(SOURCES)),
        (f"binaries.cpu.{machine}", release.binary("cpu"), wheel_bytes(BINARIES)),
    ):
        sha256 = hashlib.sha256(content).hexdigest()
        pins = pinned(pins, path, sha256)
        (cache / sha256[:16]).mkdir(parents=True)
        (cache / sha256[:16] / artifact.filename).write_bytes(content)
    (root / "pins.toml").write_text(pins)

    names = closure(ROOTS)
    text = (LOCKS / f"vllm-{version}.txt").read_text()
    _, small = lock.split(text, sorted(names))
    (root / "locks").mkdir()
    (root / "locks" / f"vllm-{version}.txt").write_text(small)
    return root


def pin_another_release(root: Path, cache: Path) -> None:
    """A release in pins.toml and the cache, like the default one but for its sources."""
    text = (root / "pins.toml").read_text()
    tables = re.findall(rf'^\[vllm\.release\."{OLD}".*?(?=^\[(?!vllm\.release\."{OLD}"))', text,
                        re.MULTILINE | re.DOTALL)  # fmt: skip
    content = sdist_bytes(CHANGED, folder=f"vllm-{NEW}")
    sha256 = hashlib.sha256(content).hexdigest()
    table = "".join(tables)
    table = re.sub(r'(sdist\]\nproject = .*\nfilename = ").*?("\nsha256 = ").*?"',
                   rf'\g<1>vllm-{NEW}.tar.gz\g<2>{sha256}"', table)  # fmt: skip
    table = table.replace(f'release."{OLD}"', f'release."{NEW}"')
    (root / "pins.toml").write_text(text.replace("\n[packages]\n", f"\n{table}\n[packages]\n", 1))
    (cache / sha256[:16]).mkdir(parents=True)
    (cache / sha256[:16] / f"vllm-{NEW}.tar.gz").write_bytes(content)
    shutil.copy(root / "locks" / f"vllm-{OLD}.txt", root / "locks" / f"vllm-{NEW}.txt")


def copy_files_of_this_checkout(root: Path) -> None:
    """What git has of this checkout, edits included, into `root`; files that are gone here go."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
        else:
            (root / name).unlink(missing_ok=True)


def copy_checkout(template: Path, folder: Path) -> Checkout:
    root, cache = folder / ODD / "vllm kernels", folder / ODD / "cache"
    shutil.copytree(template, root)
    shutil.copytree(template.parent / "cache", cache)
    own_uv = MACHINE / "tools" / f"uv-{load().uv.version}" / "uv"
    if own_uv.exists():
        tools = root / ".workspace" / "tools" / own_uv.parent.name
        tools.mkdir(parents=True)
        shutil.copy(own_uv, tools)
    # Compiled once for all of them: what is compiled does not depend on the folder.
    places = {
        "WORKSPACE_CACHE": str(cache),
        "CUSTOM_KERNELS_CACHE": str(template.parent / "kernels"),
    }
    return Checkout(root, clean_environment() | places)


def path_with(folder: Path, *programs: str) -> str:
    """A value for PATH with these programs of this machine and its Python, and nothing else."""
    folder.mkdir()
    for name in programs:
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)
    (folder / "python3").symlink_to(BASE_PYTHON)
    return str(folder)


def require_space(folder: Path, gigabytes: int) -> None:
    """Skip where a test would fill the disk."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB free in {folder}, which has {free:.0f}")


def clean_environment() -> dict[str, str]:
    """The environment of a user's shell, without what `make test` and this checkout added."""
    drop = (
        "MAKEFLAGS",
        "MAKELEVEL",
        "MFLAGS",
        "K",
        "FORCE",
        "ARCH",
        "BUILD",
        "TARGET",
        "JOBS",
        "CUDA_ARCHS",
        "WORKSPACE_HOME",
        "CUSTOM_KERNELS_CACHE",
        setup_lock.VARIABLE,
        *settings.EXPORTED,
        *settings.EXPORTED.values(),
    )
    kept = {k: v for k, v in os.environ.items() if k not in drop}
    return kept | {"DEVICE": "cpu", "PYTHON": BASE_PYTHON}


@pytest.fixture
def small_checkout(_small_template: Path, tmp_path: Path) -> Checkout:
    """A fresh small checkout; `make dev` has not run in it."""
    return copy_checkout(_small_template, tmp_path)


@pytest.fixture(scope="session")
def _ready(_small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = make_ready(_small_template, tmp_path_factory.mktemp("ready"))
    saved = checkout.root.parent / "saved"
    shutil.copytree(checkout.root / "vllm-fork", saved / "vllm-fork", symlinks=True)
    shutil.copy(checkout.root / "pins.toml", saved)
    return checkout


def make_ready(template: Path, folder: Path) -> Checkout:
    """A small checkout with a second release in its pins, in which `make dev` has run."""
    checkout = copy_checkout(template, folder)
    pin_another_release(checkout.root, Path(checkout.env["WORKSPACE_CACHE"]))
    (folder / "gitconfig").write_text("[user]\nname = U\nemail = u@example.invalid\n")
    checkout.env["GIT_CONFIG_GLOBAL"] = str(folder / "gitconfig")
    result = checkout.make("dev")
    assert result.returncode == 0, result.stdout
    return checkout


@pytest.fixture
def ready_checkout(_ready: Checkout) -> Iterator[Checkout]:
    """A small checkout in which `make dev` has run, with a second release in its pins. Shared:
    vllm-fork and the pins are put back as they were. What was compiled of vLLM stays."""
    yield _ready
    root, saved = _ready.root, _ready.root.parent / "saved"
    shutil.rmtree(root / "vllm-fork")
    shutil.copytree(saved / "vllm-fork", root / "vllm-fork", symlinks=True)
    shutil.copy2(saved / "pins.toml", root)
    (root / ".workspace" / "rebase.json").unlink(missing_ok=True)


NASTY = {
    "core": ["autocrlf = true", "eol = crlf", "safecrlf = true", "quotePath = false",
             "attributesFile = {}/attributes", "excludesFile = {}/ignore", "hooksPath = {}/hooks",
             "fsmonitor = {}/fails", "pager = {}/fails", "editor = {}/fails", "abbrev = 40",
             "commentChar = %", "ignoreCase = true", "whitespace = cr-at-eol"],
    "commit": ["gpgSign = true", "template = {}/fails", "cleanup = scissors"],
    "tag": ["gpgSign = true", "sort = -refname"],
    "gpg": ["program = {}/fails"],
    "i18n": ["commitEncoding = latin1", "logOutputEncoding = latin1"],
    "init": ["templateDir = {}/template", "defaultObjectFormat = sha256", "defaultBranch = odd"],
    "diff": ["external = {}/fails", "noprefix = true", "mnemonicPrefix = true", "context = 9",
             "interHunkContext = 5", "renames = false", "algorithm = patience", "relative = true",
             "orderFile = {}/ignore", "suppressBlankEmpty = true", "ignoreSubmodules = all"],
    'diff "nasty"': ["textconv = {}/fails", "command = {}/fails"],
    'filter "nasty"': ["clean = tr a-z b-za", "smudge = tr b-za a-z", "required = true"],
    "status": ["showUntrackedFiles = no", "short = true", "branch = true", "renames = copies"],
    "log": ["showSignature = true", "date = iso", "decorate = full", "showRoot = false"],
    "format": ["pretty = oneline"],
    "color": ["ui = always", "diff = always"],
    "column": ["ui = always"],
    "apply": ["whitespace = error-all", "ignoreWhitespace = change"],
    "merge": ["conflictStyle = diff3", "renormalize = true", "renames = false"],
    "rebase": ["missingCommitsCheck = error", "autoSquash = true", "updateRefs = true",
               "instructionFormat = %B", "autoStash = true"],
    "rerere": ["enabled = true"],
    "submodule": ["recurse = true"],
    "protocol": ["allow = never"],
    "safe": ["bareRepository = explicit"],
    "workspace": ["version = 9.9.9", "patches = none"],
}  # fmt: skip
"""Settings by which git answers, writes or looks otherwise, or does not work at all."""


def nasty_settings(folder: Path) -> dict[str, str]:
    """The variables of a user, and of a hook around, whose git settings would break everything;
    what they name is in `folder`."""
    home, other = folder / "home", folder / "other"
    for place in (home / ".config/git", home / "hooks", home / "template/hooks", other):
        place.mkdir(parents=True)
    sections = (f"[{name}]\n\t" + "\n\t".join(lines) for name, lines in NASTY.items())
    text = "\n".join(sections).replace("{}", str(home))
    (home / "nasty").write_text(text)
    person = "\n[user]\n\tname = Jo Doe\n\temail = jo@example.invalid\n"
    (home / ".gitconfig").write_text(text + person)
    attributes = "* text=auto eol=crlf ident filter=nasty diff=nasty whitespace\n*.bat text\n"
    for name in ("attributes", ".config/git/attributes"):
        (home / name).write_text(attributes)
    for name in ("ignore", ".config/git/ignore"):
        (home / name).write_text("*\n")
    (home / "fails").write_text("#!/bin/sh\nexit 1\n")
    (home / "fails").chmod(0o755)
    for name in (
        "pre-commit",
        "commit-msg",
        "post-checkout",
        "pre-rebase",
        "reference-transaction",
    ):
        for hooks in ("hooks", "template/hooks"):
            shutil.copy(home / "fails", home / hooks / name)
    plain = {name: os.environ[name] for name in ("PATH",)} | {"HOME": str(folder)}
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "another repository"]):
        identity = ["-c", "user.name=U", "-c", "user.email=u@example.invalid"]
        subprocess.run(["git", *identity, *words], cwd=other, env=plain, check=True)
    return {
        "HOME": str(home),
        "GIT_CONFIG_SYSTEM": str(home / "nasty"),
        "GIT_CONFIG_GLOBAL": str(home / ".gitconfig"),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "core.abbrev",
        "GIT_CONFIG_VALUE_0": "39",
        "GIT_DIR": str(other / ".git"),
        "GIT_WORK_TREE": str(other),
        "GIT_INDEX_FILE": str(other / ".git/index"),
        "GIT_OBJECT_DIRECTORY": str(other / ".git/objects"),
        "GIT_PREFIX": "vllm/",
        "GIT_DEFAULT_HASH": "sha256",
        "GIT_EXTERNAL_DIFF": str(home / "fails"),
        "GIT_DIFF_OPTS": "--unified=9",
        "GIT_LITERAL_PATHSPECS": "1",
        "GIT_COMMITTER_DATE": "2001-01-01T00:00:00Z",
        "GIT_TEMPLATE_DIR": str(home / "template"),
    }


def edit_in_the_same_second(path: Path) -> None:
    """Edit a committed file so that neither its length nor, in seconds, its times differ from what
    git's index has of it; git sees that only by the index's own time."""
    index = path.parent / ".git" / "index"
    text = path.read_text()
    for _ in range(20):
        time.sleep(1.05 - time.time() % 1)
        path.write_text(text)
        subprocess.run(["git", "update-index", path.name], cwd=path.parent, check=True)
        path.write_text(text.swapcase())
        if len({int(one.stat().st_mtime) for one in (path, index)}) == 1:
            break
    else:
        raise AssertionError("one git command takes more than a second here")
    time.sleep(1.05 - time.time() % 1)


def still_running(processes: list[psutil.Process], seconds: float = 120) -> list[psutil.Process]:
    """Those that have not ended after so long; none as soon as all have.

    In a container nobody may collect an orphan that has ended, so a zombie counts as ended.
    """
    end = time.monotonic() + seconds
    while True:
        alive = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
        if not alive or time.monotonic() > end:
            return alive
        time.sleep(0.05)
