# SPDX-License-Identifier: Apache-2.0
"""`make fork-build` and `make dev BUILD=full`: real cmake, ninja, g++ and nvcc on a small release
whose build has the layout of upstream's."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.workspace.conftest import BINARIES, KILLS, UNREACHABLE, Checkout, still_running
from tests.workspace.test_dev import mounted
from workspace.fork import build, build_log, time_left, upstream_sources
from workspace.host.errors import WorkspaceError
from workspace.host.git import git
from workspace.host.paths import ROOT
from workspace.pins.model import Device, load
from workspace.pins.release import selected, tree

NUMBERS = "#define ONE 1\n"


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source that the small release's build needs, as the user has it: a folder."""
    folder = tmp_path_factory.mktemp("numbers")
    (folder / "numbers.h").write_text(NUMBERS)
    return folder


@pytest.fixture
def checkout(ready_checkout: Checkout) -> Checkout:
    """One whose tree is precompiled. What other tests compiled lies in the build folder still."""
    return ready_checkout


@pytest.fixture
def fresh(checkout: Checkout) -> Checkout:
    """One in which nothing was ever compiled of vLLM."""
    shutil.rmtree(checkout.root / ".workspace/build", ignore_errors=True)
    shutil.rmtree(checkout.root / ".workspace/sources", ignore_errors=True)
    return checkout


def call(checkout: Checkout, library: str, function: str) -> int:
    """What a function of an extension in the tree returns, in a process of its own."""
    code = "import ctypes, sys; print(getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])())"
    path = checkout.src / "vllm" / f"{library}.abi3.so"
    result = subprocess.run(
        [sys.executable, "-c", code, path, function], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


def binaries_row(checkout: Checkout) -> dict[str, str]:
    answer, _ = json.JSONDecoder().raw_decode(checkout.make("doctor", "JSON=1").stdout)
    return next(row for row in answer["checks"] if row["name"] == "binaries")


def edit(checkout: Checkout, name: str, old: str, new: str) -> None:
    path = checkout.src / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def compiled(output: str) -> set[str]:
    """The sources that a build compiled."""
    return set(
        re.findall(r"^\[\d+/\d+\] Building \w+ object .*/(\w+\.\w+)\.o$", output, re.MULTILINE)
    )


def has_open(process: psutil.Process, path: Path) -> bool:
    with contextlib.suppress(OSError):  # it may have ended
        return any(one.readlink() == path for one in Path(f"/proc/{process.pid}/fd").iterdir())
    return False


def assert_nothing_half_made(checkout: Checkout) -> None:
    assert list(checkout.src.rglob("*.partial")) == []
    assert checkout.git("status", "--porcelain") == ""


def test_a_full_build_compiles_everything_and_then_only_what_changed(
    fresh: Checkout, numbers: Path
) -> None:
    checkout = fresh
    given = f"NUMBERS_SRC_DIR={numbers}"
    (checkout.src / "CMakeUserPresets.json").write_text("the user's own, and no JSON")
    result = checkout.make("dev", "BUILD=full", given)
    assert result.returncode == 0, result.stdout
    assert compiled(result.stdout) == {"first.cpp", "second.cpp", "moe.cu"}
    assert [
        call(checkout, *it) for it in (("_C", "first"), ("_C", "second"), ("_moe_C", "third"))
    ] == [1, 2, 3]
    assert (checkout.src / "CMakeUserPresets.json").read_text() == "the user's own, and no JSON"
    (checkout.src / "CMakeUserPresets.json").unlink()
    assert_nothing_half_made(checkout)
    row = binaries_row(checkout)
    assert row["status"] == "ok"
    assert "all compiled here" in row["detail"]

    before = (checkout.src / "vllm/_C.abi3.so").stat().st_mtime_ns
    again = checkout.make("dev", "BUILD=full", given)
    assert compiled(again.stdout) == set()
    assert "the tree is up to date" in again.stdout
    plain = checkout.make("dev")
    assert plain.stdout.strip() == "· ready"
    assert (checkout.src / "vllm/_C.abi3.so").stat().st_mtime_ns == before

    edit(checkout, "csrc/second.cpp", "return 2", "return 22")
    row = binaries_row(checkout)
    assert row["status"] == "note"
    assert "csrc/second.cpp" in row["detail"]
    assert row["remedy"] == "make fork-build"
    result = checkout.make("fork-build", given)
    assert compiled(result.stdout) == {"second.cpp"}
    assert "new in the tree: vllm/_C.abi3.so\n" in result.stdout
    assert call(checkout, "_C", "second") == 22
    assert binaries_row(checkout)["status"] == "ok"

    # `make bench BASELINE=pristine` compares with the wheel's.
    code = (
        "from pathlib import Path; from workspace.fork import built_from, install; "
        "install.extract_replaced(built_from.read_manifest(), Path('released'))"
    )
    subprocess.run([checkout.python, "-c", code], cwd=checkout.root, env=checkout.env, check=True)
    released = (checkout.root / "released" / "vllm").iterdir()
    assert {one.name: one.read_bytes() for one in released} == {
        "_C.abi3.so": BINARIES["vllm/_C.abi3.so"]
    }
    shutil.rmtree(checkout.root / "released")

    # An edit that is taken back is an edit, too.
    checkout.git("checkout", "-q", "csrc")
    assert "csrc/second.cpp" in binaries_row(checkout)["detail"]


def test_one_extension_of_a_precompiled_tree_is_built_and_the_wheels_comes_back(
    fresh: Checkout, numbers: Path
) -> None:
    checkout = fresh
    given = f"NUMBERS_SRC_DIR={numbers}"
    assert "released wheel" in binaries_row(checkout)["detail"]
    (checkout.src / "csrc/added.h").write_text("#define ADDED 5\n")
    edit(checkout, "csrc/second.cpp", 'extern "C"', '#include "added.h"\nextern "C"')
    edit(checkout, "csrc/second.cpp", "return 2", "return ADDED")
    row = binaries_row(checkout)
    assert (row["status"], row["remedy"]) == ("note", "make fork-build")
    assert "csrc/added.h, csrc/second.cpp" in row["detail"]

    unknown = checkout.make("fork-build", "TARGET=_moe", given)
    assert unknown.returncode != 0
    assert "TARGET=_moe is not an extension; use one of _C, _moe_C" in unknown.stdout

    result = checkout.make("fork-build", "TARGET=_C", given)
    assert result.returncode == 0, result.stdout
    assert compiled(result.stdout) == {"first.cpp", "second.cpp"}
    assert call(checkout, "_C", "second") == 5
    assert not (checkout.src / "vllm/_moe_C.abi3.so").exists()
    for name in sorted(BINARIES.keys() - {"vllm/_C.abi3.so"}):
        assert (checkout.src / name).read_bytes() == BINARIES[name]
    row = binaries_row(checkout)
    assert row["status"] == "ok"
    assert "released wheel; _C compiled here" in row["detail"]

    for verb in (("dev",), ("kernels",)):
        assert checkout.make(*verb).returncode == 0
    assert call(checkout, "_C", "second") == 5
    result = checkout.make("dev", "BUILD=precompiled")
    assert result.returncode == 0, result.stdout
    assert (checkout.src / "vllm/_C.abi3.so").read_bytes() == BINARIES["vllm/_C.abi3.so"]
    assert "compiled here" not in binaries_row(checkout)["detail"]
    assert checkout.git("for-each-ref", "refs/workspace/built") == ""
    # The edits are the user's, whatever the binaries are.
    assert "return ADDED" in (checkout.src / "csrc/second.cpp").read_text()


def test_what_cmake_args_set_ends_with_them(checkout: Checkout, numbers: Path) -> None:
    given = ("TARGET=_C", f"NUMBERS_SRC_DIR={numbers}")
    result = checkout.make("fork-build", *given, CMAKE_ARGS="-DCMAKE_CXX_FLAGS=-Dsecond=renamed")
    assert result.returncode == 0, result.stdout
    assert call(checkout, "_C", "renamed") == 2
    result = checkout.make("fork-build", *given)
    assert compiled(result.stdout) == {"first.cpp", "second.cpp"}
    assert call(checkout, "_C", "second") == 2


def test_a_compile_error_is_shown_and_the_tree_stays(checkout: Checkout, numbers: Path) -> None:
    given = f"NUMBERS_SRC_DIR={numbers}"
    edit(checkout, "csrc/second.cpp", "return 2", "return undeclared_name")
    result = checkout.make("fork-build", given)
    assert result.returncode != 0
    assert re.search(r"second\.cpp:1:\d+: error: .undeclared_name. was not declared", result.stdout)
    assert "Traceback" not in result.stdout
    log = Path(re.findall(r"log: (.+)", result.stdout.splitlines()[-2])[0])
    assert "undeclared_name" in log.read_text()
    assert (checkout.src / "vllm/_C.abi3.so").read_bytes() == BINARIES["vllm/_C.abi3.so"]
    checkout.git("checkout", "-q", "csrc")
    fixed = checkout.make("fork-build", "TARGET=_C", given)
    assert fixed.returncode == 0, fixed.stdout
    assert call(checkout, "_C", "second") == 2


def test_cmakes_own_error_is_shown(checkout: Checkout, numbers: Path) -> None:
    (checkout.src / "CMakeLists.txt").write_text(
        'cmake_minimum_required(VERSION 3.26)\nmessage(FATAL_ERROR "needs a newer compiler")\n'
    )
    result = checkout.make("fork-build", f"NUMBERS_SRC_DIR={numbers}")
    assert result.returncode != 0
    assert "CMake Error at CMakeLists.txt:2 (message):\n  needs a newer compiler" in result.stdout
    assert "configuring failed (above); log: " in result.stdout


def test_a_source_out_of_reach_is_said_before_anything_is_compiled(fresh: Checkout) -> None:
    checkout = fresh
    result = checkout.make("dev", "BUILD=full")
    assert result.returncode != 0
    assert f"numbers one from {UNREACHABLE}: NUMBERS_SRC_DIR=<folder>" in result.stdout
    assert "1 of 1 sources are missing" in result.stdout
    assert not (checkout.root / ".workspace/build").exists()


@pytest.mark.parametrize(
    ("made", "says"), [(False, "is not a folder"), (True, "is an empty folder")]
)
def test_a_variable_that_points_nowhere_is_one_error(
    checkout: Checkout, tmp_path: Path, made: bool, says: str
) -> None:
    folder = tmp_path / "none"
    if made:
        folder.mkdir()
    result = checkout.make("fork-build", f"NUMBERS_SRC_DIR={folder}")
    errors = [line for line in result.stdout.splitlines() if not line.startswith("make:")]
    assert len(errors) == 1
    assert f"NUMBERS_SRC_DIR={folder} {says}" in errors[0]


def test_a_source_within_reach_is_fetched_once(fresh: Checkout, tmp_path: Path) -> None:
    """A repository that git is told to take instead; then it is gone, and nothing is missing.

    The user's git settings change no file of it, nor does a hook around us.
    """
    checkout = fresh
    repository = tmp_path / "numbers.git"
    repository.mkdir()
    (repository / "numbers.h").write_text(NUMBERS)
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"], ["tag", "one"]):
        identity = ["-c", "user.name=U", "-c", "user.email=u@example.invalid"]
        subprocess.run(["git", *identity, *words], cwd=repository, check=True)
    nasty = tmp_path / "attributes"
    nasty.write_text("* filter=nasty\n")
    (tmp_path / "gitconfig").write_text(
        f"[core]\n\tattributesFile = {nasty}\n\thooksPath = {tmp_path}\n"
        '[filter "nasty"]\n\tsmudge = false\n\trequired = true\n'
    )
    rewritten = {
        "GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig"),
        "GIT_DIR": str(tmp_path),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{repository}.insteadOf",
        "GIT_CONFIG_VALUE_0": UNREACHABLE,
    }
    result = checkout.make("fork-build", "TARGET=_C", **rewritten)
    assert result.returncode == 0, result.stdout
    assert call(checkout, "_C", "first") == 1
    shutil.rmtree(repository)
    edit(checkout, "csrc/second.cpp", "return 2", "return 7")
    result = checkout.make("fork-build", "TARGET=_C")
    assert result.returncode == 0, result.stdout
    assert call(checkout, "_C", "second") == 7


def test_a_library_edited_by_hand_is_not_replaced(checkout: Checkout, numbers: Path) -> None:
    library = checkout.src / "vllm/_C.abi3.so"
    library.write_bytes(b"patched by hand")
    given = ("TARGET=_C", f"NUMBERS_SRC_DIR={numbers}")
    result = checkout.make("fork-build", *given)
    assert result.returncode != 0
    assert "vllm/_C.abi3.so" in result.stdout
    assert "changed by hand" in result.stdout
    assert library.read_bytes() == b"patched by hand"
    assert checkout.make("fork-build", *given, "FORCE=1").returncode == 0
    assert call(checkout, "_C", "first") == 1


def test_a_library_compiled_for_other_packages_is_a_problem(
    checkout: Checkout, numbers: Path
) -> None:
    assert checkout.make("fork-build", "TARGET=_C", f"NUMBERS_SRC_DIR={numbers}").returncode == 0
    path = checkout.src / ".git/workspace-binaries.json"
    manifest = json.loads(path.read_text())
    assert manifest["builds"]["_C"]["packages"].keys() >= {"nvidia-cuda-nvcc"}
    manifest["builds"]["_C"]["packages"]["nvidia-cuda-nvcc"] = "12.8.93"
    path.write_text(json.dumps(manifest))
    row = binaries_row(checkout)
    assert row["status"] == "problem"
    assert "_C was compiled with nvidia-cuda-nvcc 12.8.93 (now 13." in row["detail"]
    assert row["remedy"] == "make fork-build"


def test_an_edited_rust_file_is_named_with_its_own_remedy(checkout: Checkout) -> None:
    edit(checkout, "rust/lib.rs", "main", "other")
    row = binaries_row(checkout)
    assert row["status"] == "note"
    assert "Rust parts without the edits of rust/lib.rs" in row["detail"]
    assert "build_rust.sh" in row["remedy"]


@pytest.mark.slow
def test_killed_at_any_moment_no_half_library_is_left(checkout: Checkout, numbers: Path) -> None:
    given = f"NUMBERS_SRC_DIR={numbers}"
    started = time.monotonic()
    assert checkout.make("fork-build", given).returncode == 0
    whole = time.monotonic() - started
    good = {(checkout.src / "vllm/_C.abi3.so").read_bytes(), BINARIES["vllm/_C.abi3.so"]}
    chance = random.Random()
    for attempt in range(KILLS):
        edit(checkout, "csrc/second.cpp", f"return {attempt + 2};", f"return {attempt + 3};")
        if attempt % 2:
            shutil.rmtree(checkout.root / ".workspace/build", ignore_errors=True)
        process = checkout.start("fork-build", given)
        time.sleep(chance.uniform(0, whole * (1.0 if attempt % 2 else 0.4)))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        content = (checkout.src / "vllm/_C.abi3.so").read_bytes()
        if content not in good:
            assert call(checkout, "_C", "second") == attempt + 3
            good.add(content)
    result = checkout.make("fork-build", given)
    assert result.returncode == 0, result.stdout
    assert call(checkout, "_C", "second") == KILLS + 2
    assert list(checkout.src.rglob("*.partial")) == []
    assert binaries_row(checkout)["status"] == "ok"


def test_cut_off_while_installing_the_doctor_says_so_and_the_next_build_finishes(
    checkout: Checkout, numbers: Path
) -> None:
    """The process ends in the middle of writing a library, as if killed just there."""
    given = {"NUMBERS_SRC_DIR": str(numbers), "DEVICE": "cpu"}
    code = (
        "import os, shutil\n"
        "def half(source, target):\n"
        "    target.write_bytes(source.read_bytes()[:1000]); os._exit(9)\n"
        "shutil.copy2 = half\n"
        "from workspace import verbs\n"
        "from workspace.fork import build\n"
        "build.run('cpu', verbs.ForkBuild(target='_C'))\n"
    )
    result = subprocess.run(
        [checkout.python, "-c", code], cwd=checkout.root, capture_output=True, text=True,
        env={**checkout.env, **given, "PATH": f"{checkout.python.parent}:{os.environ['PATH']}"},
        check=False,
    )  # fmt: skip
    assert result.returncode == 9, result.stderr
    assert (checkout.src / "vllm/_C.abi3.so").read_bytes() == BINARIES["vllm/_C.abi3.so"]
    row = binaries_row(checkout)
    assert (row["status"], row["remedy"]) == ("problem", "make fork-build")
    assert checkout.make("fork-build", "TARGET=_C", f"NUMBERS_SRC_DIR={numbers}").returncode == 0
    assert call(checkout, "_C", "first") == 1
    assert_nothing_half_made(checkout)
    assert binaries_row(checkout)["status"] == "ok"


def test_ctrl_c_ends_the_build_and_the_compilers(checkout: Checkout, numbers: Path) -> None:
    given = f"NUMBERS_SRC_DIR={numbers}"
    # A header that never comes to its end keeps the compiler busy.
    pipe = numbers / "endless.h"
    os.mkfifo(pipe)
    edit(checkout, "csrc/second.cpp", 'extern "C"', '#include "endless.h"\nextern "C"')
    process = checkout.start("fork-build", "TARGET=_C", given)
    writer = None
    while writer is None:
        with contextlib.suppress(OSError):  # until somebody reads
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        assert process.poll() is None
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any(has_open(child, pipe) for child in family)  # the compiler, whichever it is
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate()
    os.close(writer)
    assert "interrupted; run the same command again" in output
    assert "Traceback" not in output
    assert still_running(family) == []
    assert (checkout.src / "vllm/_C.abi3.so").read_bytes() == BINARIES["vllm/_C.abi3.so"]


@pytest.mark.skipif(not shutil.which("ccache"), reason="ccache is not on PATH")
def test_what_ccache_has_is_not_compiled_again(
    fresh: Checkout, numbers: Path, tmp_path: Path
) -> None:
    given = (f"NUMBERS_SRC_DIR={numbers}", f"CCACHE_DIR={tmp_path}/cache")
    for _ in range(2):
        shutil.rmtree(fresh.root / ".workspace/build", ignore_errors=True)
        result = fresh.make("fork-build", *given)
        assert result.returncode == 0, result.stdout
        assert "configuring vLLM's build for cpu, ccache" in result.stdout
    statistics = subprocess.run(
        ["ccache", "--print-stats"], capture_output=True, text=True, check=True,
        env={**os.environ, "CCACHE_DIR": f"{tmp_path}/cache"},
    ).stdout  # fmt: skip
    counts = dict(line.split("\t") for line in statistics.splitlines())
    hits = int(counts["direct_cache_hit"]) + int(counts["preprocessed_cache_hit"])
    assert hits >= 3, statistics


def test_in_a_terminal_a_bar_shows_how_far_it_is(tmp_path: Path) -> None:
    steps = 'for i in 1 2 3; do echo "[$i/3] Building part$i.o"; sleep 0.5; done; echo a warning'
    code = (
        "import os, sys; from pathlib import Path; from workspace.fork import build_log; "
        "build_log.run(['sh', '-c', sys.argv[1]], what='it', log=Path(sys.argv[2]), "
        "folder=Path(sys.argv[2]).parent, env=dict(os.environ), jobs=2)"
    )
    (tmp_path / ".ninja_log").write_text("# ninja log v7\n0\t300000\t1\tpart3.o\tcafe\n")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    result = subprocess.run(
        [sys.executable, "-c", code, steps, str(tmp_path / "log")],
        cwd=ROOT, env=environment, stderr=theirs, stdout=theirs, check=False,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # a terminal that all have left
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode())
    assert result.returncode == 0, plain
    assert re.search(r"━+ +2/3 +[\d:]+ +about 2 min left +part2\b", plain), plain
    assert re.search(r"━+ +3/3 +[\d:]+ +part3\b", plain), plain
    assert "a warning" not in plain
    assert "a warning" in (tmp_path / "log").read_text()


# --- the parts ------------------------------------------------------------------------------------


def test_the_time_left_is_a_lower_bound_until_each_target_was_seen() -> None:
    """Two fetched files took 2 and 4 s; a.cpp took 100 s when it was last compiled."""
    known = {"src/one.dir/x.o": 2.0, "src/one.dir/y.o": 4.0, "_C.dir/csrc/a.o": 100.0}
    fetched = {f"src/one.dir/{number}.o" for number in range(100)}
    assert time_left.left(fetched, {}, 2) == ""
    assert time_left.left(fetched, known, 1) == "about 5 min left"
    assert time_left.left(fetched | {"_C.dir/csrc/a.o"}, known, 2) == "about 3 min left"
    assert time_left.left({"_C.dir/csrc/b.o", "_C.so"}, known, 1) == "about 2 min left"
    others = {"_C_AVX2.dir/csrc/b.o", "_C_AVX2.dir/csrc/c.o"}
    assert time_left.left(others, known, 1) == "at least 1 min left"
    assert time_left.left(others, known, 2) == "2 steps still running"
    assert time_left.left({"_C.dir/csrc/a.o"}, known, 2) == "about 1 min left"


def test_the_files_of_a_build_and_how_long_they_took_are_ninjas(tmp_path: Path) -> None:
    rule = "rule slow\n  command = sleep 0.2 && touch $out\n  description = Making $out\n"
    (tmp_path / "build.ninja").write_text(rule + "build one.dir/a.o: slow\nbuild b: slow\n")
    (tmp_path / "CMakeCache.txt").write_text(
        "CMAKE_PROJECT_NAME:STATIC=small\nCMAKE_GENERATOR:INTERNAL=Ninja\n"
        f"CMAKE_MAKE_PROGRAM:FILEPATH={shutil.which('ninja')}\n"
    )
    command, environment = ["cmake", "--build", str(tmp_path)], dict(os.environ)
    assert time_left.planned(command, environment) == {"one.dir/a.o", "b"}
    subprocess.run([*command, "--target", "b"], check=True, capture_output=True)
    assert time_left.planned(command, environment) == {"one.dir/a.o"}
    ((made, seconds),) = time_left.durations(tmp_path).items()
    assert made == "b"
    assert 0.2 <= seconds < 20


@pytest.mark.parametrize(
    ("cores", "gib", "device", "count"),
    [(16, 1000.0, "cuda", 16), (16, 128.0, "cuda", 15), (2, 3.0, "cuda", 1), (8, 8.0, "cpu", 4)],
)
def test_jobs_are_limited_by_memory_as_well_as_cores(
    cores: int, gib: float, device: Device, count: int
) -> None:
    assert build.jobs(None, device, cores, gib) == count
    assert build.jobs(3, device, cores, gib) == 3


@pytest.mark.parametrize(
    ("asked", "taken"), [("9.0a", "9.0a"), ("8.0,9.0a", "8.0;9.0a"), ("10.0f 12.0", "10.0f;12.0")]
)
def test_architectures_are_taken_as_asked(asked: str, taken: str) -> None:
    assert build.architectures(asked, "cuda") == taken


def test_an_architecture_that_is_none_is_refused() -> None:
    with pytest.raises(WorkspaceError, match="CUDA_ARCHS=sm_90: 'sm_90' is not an architecture"):
        build.architectures("sm_90", "cuda")


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="there is a GPU here")
def test_without_a_gpu_the_architecture_has_to_be_named() -> None:
    with pytest.raises(WorkspaceError, match=r"name the architecture: CUDA_ARCHS=9\.0a"):
        build.architectures(None, "cuda")


@pytest.mark.gpu
def test_the_architecture_is_that_of_the_gpu() -> None:
    import torch

    major, minor = torch.cuda.get_device_capability()
    assert f"{major}.{minor}" in build.architectures(None, "cuda")


def test_a_full_disk_and_too_little_memory_are_said_in_words(tmp_path: Path) -> None:
    assert "a disk is full" in build_log.remedy(
        "fatal error: when writing: No space left on device", tmp_path
    )
    assert "JOBS=1" in build_log.remedy(
        "g++: fatal error: Killed signal terminated program cc1plus", tmp_path
    )
    assert build_log.remedy("error: expected ';'", tmp_path) == ""


def test_libnuma_is_looked_for_before_anything_is_compiled(tmp_path: Path) -> None:
    """A compiler that finds nothing: it matters only to a release whose build links libnuma."""
    build.require_libnuma(tmp_path, "false")
    listed = tmp_path / "cmake/cpu_extension.cmake"
    listed.parent.mkdir()
    listed.write_text("set(LIBS dl)\n")
    build.require_libnuma(tmp_path, "false")
    listed.write_text("list(APPEND LIBS numa)\n")
    build.require_libnuma(tmp_path, "true")
    with pytest.raises(WorkspaceError, match="install your distribution's libnuma-dev"):
        build.require_libnuma(tmp_path, "false")


def test_without_a_compiler_the_error_says_what_to_install(
    checkout: Checkout, numbers: Path, tmp_path: Path
) -> None:
    """A PATH with all that set-up needs, and no C++ compiler."""
    bare = tmp_path / "bin"
    bare.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for tool in Path(folder).glob("*") if Path(folder).is_dir() else ():
            if not re.search(r"\+\+|nvcc", tool.name) and not (bare / tool.name).exists():
                (bare / tool.name).symlink_to(tool)
    result = checkout.make("fork-build", f"NUMBERS_SRC_DIR={numbers}", PATH=str(bare), CXX="")
    assert result.returncode != 0
    assert "there is no C++ compiler: install g++" in result.stdout


def test_looking_for_stale_sources_leaves_the_repository_as_it_was(checkout: Checkout) -> None:
    edit(checkout, "csrc/second.cpp", "return 2", "return 3")
    checkout.git("status")  # Git notes the times of files that were copied when it is asked first.
    objects = checkout.git("count-objects", "-v")
    index = (checkout.src / ".git/index").read_bytes()
    assert binaries_row(checkout)["status"] == "note"
    assert checkout.git("count-objects", "-v") == objects
    assert (checkout.src / ".git/index").read_bytes() == index


# --- vLLM itself ----------------------------------------------------------------------------------

NAMES = {
    "cuda": {"cutlass", "deepgemm", "deepselect", "flashkda", "flashmla", "fmha_sm100", "qutlass",
             "tml_fa4", "triton_kernels", "vllm-flash-attn"},
    "cpu": {"oneDNN"},
}  # fmt: skip
in_the_default_release = pytest.mark.skipif(
    selected() != load().vllm.default or not (tree() / "CMakeLists.txt").exists(),
    reason="needs the default release's environment and tree: make dev",
)


@in_the_default_release
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_source_that_upstreams_cmake_files_fetch_is_found(device: Device) -> None:
    """All repositories that stand in the files, each with a tag and a variable of its own."""
    place = tree()
    both = {
        source.repository: source
        for machine in ("x86_64", "aarch64")
        for source in upstream_sources.sources(place, device, machine)
    }
    files = [place / "CMakeLists.txt", *(place / "cmake").rglob("*.cmake")]
    named = {
        address
        for path in files
        if (path.name == "cpu_extension.cmake") == (device == "cpu")
        for line in path.read_text().splitlines()
        if not re.search(r"^\s*#|/ROCm/|/(pull|issues)/", line)
        for address in re.findall(r"https://github\.com/[\w./-]+", line)
    }
    assert named == set(both)
    assert {one.name for one in upstream_sources.sources(place, device, "x86_64")} == NAMES[device]
    for source in both.values():
        assert re.fullmatch(r"v[\d.]+|[0-9a-f]{40}", source.tag)
        assert re.search(rf"\$ENV\{{{source.variable}\}}", "".join(p.read_text() for p in files))
    assert len({source.variable for source in both.values()}) == len(both)


def test_an_arm_cpu_takes_other_sources_and_a_variable_is_never_guessed() -> None:
    text = """
        # FetchContent_Declare(commented GIT_REPOSITORY https://a.invalid/no GIT_TAG 1)
        set(REPO "https://a.invalid/one.git")
        if(ASIMD_FOUND)
          if(DEFINED ENV{ONE_SRC_DIR} AND (A OR (B AND C)))
          endif()
          FetchContent_Populate(one GIT_REPOSITORY "${REPO}" GIT_TAG v1)
        else()
          FetchContent_Declare(Two GIT_REPOSITORY https://a.invalid/two GIT_TAG v2)
        endif()
        FetchContent_Declare(local SOURCE_DIR $ENV{X_SRC_DIR})
    """
    (one,) = upstream_sources.read(text, "aarch64")
    assert one == upstream_sources.Source("one", "https://a.invalid/one.git", "v1", "ONE_SRC_DIR")
    (two,) = upstream_sources.read(text.replace("ENV{ONE_SRC_DIR}", "X"), "x86_64")
    assert two.variable == "FETCHCONTENT_SOURCE_DIR_TWO"


def configured(folder: Path, monkeypatch: pytest.MonkeyPatch, **given: Path) -> build.Build:
    """vLLM's own build for CUDA in a folder of the test's; nothing goes into the tree."""
    for source in upstream_sources.sources(tree(), "cuda", "x86_64"):
        monkeypatch.delenv(source.variable, raising=False)
    for variable, path in given.items():
        monkeypatch.setenv(variable, str(path))
    monkeypatch.setenv("FETCHCONTENT_BASE_DIR", str(folder / "sources"))
    # As bootstrap does it: the environment's cmake and ninja before the system's.
    monkeypatch.setenv("PATH", f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}")
    prepared = build.prepare("cuda", "8.0")
    log = folder / "log"
    return replace(prepared, folder=folder / "build", log=log)


@in_the_default_release
@pytest.mark.nvcc
def test_upstreams_configure_finds_everything_up_to_the_first_source_that_it_fetches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python, the compilers, CUDA from the packages, torch: all of it is there, and the first
    thing that is not is CUTLASS."""
    build_of = partial(configured, tmp_path, monkeypatch)
    wanted = upstream_sources.sources(tree(), "cuda", "x86_64")
    if wanted[0].reachable():
        pytest.skip("the sources can be fetched from here: make dev BUILD=full does it all")
    with pytest.raises(WorkspaceError, match=f"{len(wanted)} of {len(wanted)} sources are missing"):
        build_of()
    monkeypatch.setattr(upstream_sources.Source, "reachable", lambda _self: True)
    prepared = build_of()
    with pytest.raises(WorkspaceError, match="configuring failed"):
        prepared.configure()
    log = prepared.log.read_text()
    release = load().release()
    assert f"-- PyTorch: CUDA detected: {release.cuda.release}" in log
    assert "-- CUDA supported target architectures: 8.0" in log
    assert "cutlass-populate" in log
    assert "deepgemm" not in log


@in_the_default_release
@pytest.mark.nvcc
@pytest.mark.slow
def test_extensions_of_vllm_itself_are_compiled_where_the_sources_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUTLASS is the real one of flashinfer's package. The others are projects of this test with
    nothing in them: what is compiled here does not use them."""
    spec = find_spec("flashinfer")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    cutlass = Path(spec.submodule_search_locations[0]) / "data/cutlass"
    place = tree()
    given = {"VLLM_CUTLASS_SRC_DIR": cutlass}
    for source in upstream_sources.sources(place, "cuda", "x86_64")[1:]:
        folder = tmp_path / source.name
        (folder / "flash_mla").mkdir(parents=True)
        (folder / "flash_mla/flash_mla_interface.py").touch()
        text = "cmake_minimum_required(VERSION 3.26)\nproject(empty LANGUAGES CXX)\n"
        (folder / "CMakeLists.txt").write_text(text)
        given[source.variable] = folder
    prepared = configured(tmp_path, monkeypatch, **given)
    before = git("status", "--porcelain", tree=place)
    try:
        prepared.configure()
    except WorkspaceError:
        if too_old := re.search(r"GCC >= \d+ is required .*\)", prepared.log.read_text()):
            pytest.skip(too_old[0])
        raise
    assert {"_C_stable_libtorch", "cumem_allocator", "spinloop"} <= set(prepared.targets())
    for name in ("cumem_allocator", "spinloop"):
        prepared.compile(name, 2)
        stage = prepared.stage(name)
        (library,) = [path for path in stage.rglob("*") if path.is_file()]
        assert library.relative_to(stage) == Path(f"vllm/{name}.abi3.so")
        listed = subprocess.run(
            ["nm", "-D", library], capture_output=True, text=True, check=True
        ).stdout
        assert f"PyInit_{name}" in listed
    needed = subprocess.run(
        ["readelf", "-d", stage.parent / "cumem_allocator.abi3.so"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "[libcuda.so.1]" in needed
    assert git("status", "--porcelain", tree=place) == before


@pytest.mark.parametrize("size", ["64k", "300k"])
def test_a_full_disk_is_said_in_words_and_the_build_goes_on_after(
    fresh: Checkout, numbers: Path, size: str
) -> None:
    place = fresh.root / ".workspace/build"
    place.mkdir()
    given = ("TARGET=_C", f"NUMBERS_SRC_DIR={numbers}")
    with mounted(place, "-t", "tmpfs", "-o", f"size={size}", "none"):
        result = fresh.make("fork-build", *given)
    assert result.returncode != 0
    assert "free some space" in result.stdout
    assert "Traceback" not in result.stdout
    assert fresh.make("fork-build", *given).returncode == 0
    assert call(fresh, "_C", "first") == 1
