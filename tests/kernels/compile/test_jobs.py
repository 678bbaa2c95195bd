# SPDX-License-Identifier: Apache-2.0
"""Compilers of all processes share the machine's cores and memory."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from custom_kernels.compile import jobs

HOLD = """
import sys
from custom_kernels.compile import jobs
with jobs.slot(4 * jobs.GIB, cores=2):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    """Another process of this user, which compiles something of 4 GiB."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_memory_that_is_free_is_that_of_this_machine() -> None:
    assert 0 < jobs.available() <= psutil.virtual_memory().total


def test_the_first_compiler_starts_however_little_memory_there_is() -> None:
    with jobs.slot(10 * jobs.GIB, free=lambda: 0):
        pass


def test_a_compiler_waits_for_the_memory_that_another_process_may_take(
    other: subprocess.Popen[str],
) -> None:
    started = threading.Event()

    def compile_too() -> None:
        with jobs.slot(2 * jobs.GIB, cores=2, free=lambda: 5 * jobs.GIB):
            started.set()

    thread = threading.Thread(target=compile_too)
    thread.start()
    assert not started.wait(5 * jobs.POLL_SECONDS)  # 5 GiB free, 4 of them promised
    other.kill()  # the operating system gives back what a killed process held
    thread.join(60)
    assert started.is_set()


def test_a_compiler_that_fits_beside_the_others_starts_at_once(
    other: subprocess.Popen[str],
) -> None:
    with jobs.slot(2 * jobs.GIB, cores=2, free=lambda: 7 * jobs.GIB):
        assert other.poll() is None


def test_no_more_compilers_than_cores(other: subprocess.Popen[str]) -> None:
    plenty = 100 * jobs.GIB
    with jobs.slot(jobs.GIB, cores=2, free=lambda: plenty):
        assert jobs._take(jobs.folder(), 2, jobs.GIB, lambda: plenty) is None
    assert other.poll() is None


def test_slots_of_somebody_else_are_not_used(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / jobs.folder().name).rmdir()
    jobs_folder = tmp_path / f"custom-kernels-jobs-{jobs.os.getuid()}"
    jobs_folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="remove it or set TMPDIR"):
        jobs.folder()
