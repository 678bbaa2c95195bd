# SPDX-License-Identifier: Apache-2.0
"""`make dev` and its neighbours, whole, in a small checkout."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workspace.conftest import BINARIES, KILLS, Checkout, path_with
from workspace.pins.model import load

VERSION = load().vllm.default


def imported(checkout: Checkout, expression: str) -> str:
    result = subprocess.run(
        [checkout.python, "-c", f"import vllm, custom_kernels; print({expression})"],
        cwd="/", capture_output=True, text=True, check=True,
    )  # fmt: skip
    return result.stdout.strip()


def assert_whole(checkout: Checkout) -> None:
    """Everything that `make dev` promises is there, and nothing half made beside it."""
    assert imported(checkout, "vllm.__file__") == str(
        checkout.tree(VERSION) / "vllm" / "__init__.py"
    )
    assert "added = True" in (checkout.src / "vllm/envs.py").read_text()
    for name, content in BINARIES.items():
        assert (checkout.src / name).read_bytes() == content
    assert checkout.git("status", "--porcelain") == ""
    assert list((checkout.root / "vllm-fork").rglob(".partial-*")) == []
    assert os.readlink(checkout.src) == f"releases/{VERSION}"
    assert list(checkout.src.rglob("*.partial")) == []
    libraries = list(Path(checkout.env["CUSTOM_KERNELS_CACHE"]).rglob("*.so"))
    assert libraries
    for library in libraries:
        listed = subprocess.run(["nm", "-D", library], capture_output=True, check=False)
        assert listed.returncode == 0


def test_dev_makes_everything_and_a_second_run_nothing(ready_checkout: Checkout) -> None:
    assert_whole(ready_checkout)
    metadata = "__import__('importlib.metadata').metadata.version('vllm')"
    assert imported(ready_checkout, metadata).startswith(f"{VERSION}+cpu")
    result = ready_checkout.make("dev")
    assert result.returncode == 0
    assert result.stdout.strip() == "· ready"


def test_an_edit_in_src_is_live_and_survives_dev(ready_checkout: Checkout) -> None:
    (ready_checkout.src / "vllm/__init__.py").write_text("VALUE = 'edited'\n")
    (ready_checkout.src / "vllm/new.py").write_text("NEW = True\n")
    assert imported(ready_checkout, "vllm.VALUE") == "edited"
    assert ready_checkout.make("dev").returncode == 0
    assert imported(ready_checkout, "vllm.VALUE") == "edited"
    assert (ready_checkout.src / "vllm/new.py").exists()


def test_missing_binaries_come_back(ready_checkout: Checkout) -> None:
    exclude = ready_checkout.src / ".git" / "info" / "exclude"
    exclude.write_text("/mine/\n" + exclude.read_text())
    (ready_checkout.src / "vllm/_C.abi3.so").unlink()
    assert ready_checkout.make("dev").returncode == 0
    assert_whole(ready_checkout)
    assert exclude.read_text().startswith("/mine/\n# Below")


def test_a_missing_environment_comes_back(ready_checkout: Checkout) -> None:
    shutil.rmtree(ready_checkout.root / ".venv")
    result = ready_checkout.make("dev")
    assert result.returncode == 0, result.stdout
    assert_whole(ready_checkout)


def test_clean_keeps_the_users_work_until_forced(small_checkout: Checkout) -> None:
    assert small_checkout.make("dev").returncode == 0
    precious = small_checkout.src / "vllm/kept.py"
    precious.write_text("mine = True\n")
    small_checkout.git("commit", "-qam", "My idea")
    (small_checkout.src / "vllm/new.py").write_text("mine = True\n")
    (small_checkout.root / ".venv-of-mine").mkdir()
    (small_checkout.root / ".clangd").write_text("Diagnostics: {}\n")
    result = small_checkout.make("clean")
    assert precious.read_text() == "mine = True\n"
    for words in ("vllm/new.py", "My idea", "make clean FORCE=1"):
        assert words in result.stdout
    left = {path.name for path in small_checkout.root.iterdir()}
    assert ".venv" not in left
    assert {".venv-of-mine", ".clangd"} <= left
    assert "compile_commands.json" not in left
    assert [path.name for path in (small_checkout.root / ".workspace").iterdir()] == ["lock"]
    again = small_checkout.make("dev")
    assert again.returncode == 0, again.stdout
    assert precious.read_text() == "mine = True\n"
    forced = small_checkout.make("clean", "FORCE=1")
    assert "My idea" in forced.stdout
    assert not small_checkout.src.exists()


def test_clean_removes_a_fork_without_the_users_work(small_checkout: Checkout) -> None:
    assert small_checkout.make("dev").returncode == 0
    result = small_checkout.make("clean")
    assert result.returncode == 0, result.stdout
    assert not small_checkout.src.exists()


def test_clean_never_removes_a_tree_it_did_not_make(small_checkout: Checkout) -> None:
    small_checkout.src.mkdir()
    (small_checkout.src / "precious").write_text("mine")
    result = small_checkout.make("clean")
    assert (small_checkout.src / "precious").exists()
    assert "did not make" in result.stdout


def test_an_edited_file_of_the_wheel_is_not_overwritten(ready_checkout: Checkout) -> None:
    """A wheel with another hash is a reason to take the binaries anew."""
    edited = ready_checkout.src / "vllm/third_party/made/__init__.py"
    edited.write_text("made = 'by me'\n")
    manifest = ready_checkout.src / ".git" / "workspace-binaries.json"
    record = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**record, "sha256": "0" * 64}))
    result = ready_checkout.make("dev")
    assert result.returncode != 0
    assert (
        f"vllm/third_party/made/__init__.py in vllm-fork/releases/{VERSION} was changed"
        in result.stdout
    )
    assert edited.read_text() == "made = 'by me'\n"
    assert ready_checkout.make("dev", "FORCE=1").returncode == 0
    assert edited.read_bytes() == BINARIES["vllm/third_party/made/__init__.py"]


def test_two_makes_at_once_do_not_meet(small_checkout: Checkout) -> None:
    first = small_checkout.start("dev")
    time.sleep(0.7)
    second = small_checkout.start("dev")
    outputs = [process.communicate()[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    waited = [text for text in outputs if "waiting: another make holds this checkout" in text]
    assert len(waited) == 1
    assert "make dev, process" in waited[0]
    assert_whole(small_checkout)


@contextlib.contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    """A mount over a folder; skips where this process may not mount."""
    result = subprocess.run(["mount", *options, str(place)], capture_output=True, check=False)
    if result.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def assert_one_clear_error(output: str, words: str) -> None:
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, output
    assert words in errors[0]
    assert "Traceback" not in output


def test_a_read_only_checkout_is_one_clear_error(small_checkout: Checkout) -> None:
    root = small_checkout.root
    with mounted(root, "--bind", str(root)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(root)], check=True)
        result = small_checkout.make("dev")
    assert result.returncode != 0
    assert_one_clear_error(result.stdout, "Read-only file system")


def test_a_full_disk_is_one_clear_error_and_dev_goes_on_after(small_checkout: Checkout) -> None:
    """The fork's folder on a file system too small for it."""
    place = small_checkout.root / "vllm-fork"
    with mounted(place, "-t", "tmpfs", "-o", "size=40k", "none"):
        result = small_checkout.make("dev")
    assert result.returncode != 0
    assert_one_clear_error(result.stdout, "No space left")
    assert small_checkout.make("dev").returncode == 0
    assert_whole(small_checkout)


def test_without_a_compiler_the_error_names_one(ready_checkout: Checkout, tmp_path: Path) -> None:
    """A PATH with everything but a C++ compiler."""
    path = path_with(tmp_path / "bin", "sh", "make", "git", "env")
    cache = {"CUSTOM_KERNELS_CACHE": str(tmp_path / "kernels")}
    result = ready_checkout.make("kernels", PATH=path, CXX="", **cache)
    assert result.returncode != 0
    assert "no C++ compiler" in result.stdout
    assert "Traceback" not in result.stdout


@pytest.mark.slow
def test_dev_survives_being_killed_at_any_moment(small_checkout: Checkout) -> None:
    """SIGKILL to the whole process group at random times; the last run finishes the work."""
    kernels = small_checkout.root / ".workspace" / "kernels"
    small_checkout.env["CUSTOM_KERNELS_CACHE"] = str(kernels)
    started = time.perf_counter()
    assert small_checkout.make("dev").returncode == 0
    length = time.perf_counter() - started
    generator = random.Random(os.urandom(8))
    for attempt in range(KILLS):
        for made in (".venv", "vllm-fork/releases", ".workspace/kernels"):
            shutil.rmtree(small_checkout.root / made, ignore_errors=True)
        if attempt % 2:
            # Killed twice before it may finish: what the first left must not mislead the second.
            kill_after(small_checkout, generator.uniform(0, length))
        delay = generator.uniform(0, length)
        kill_after(small_checkout, delay)
        result = small_checkout.make("dev")
        assert result.returncode == 0, f"killed after {delay:.2f} s: {result.stdout}"
        assert_whole(small_checkout)


def kill_after(checkout: Checkout, delay: float) -> None:
    process = checkout.start("dev")
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
