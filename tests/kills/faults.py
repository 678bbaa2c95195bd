# SPDX-License-Identifier: Apache-2.0
"""The faults: a kill, a full disk, a disk that becomes read-only."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SECONDS = 900
"""After so long a command hangs, whatever the machine."""
AMPLE = "size=4g"


class Missing(Exception):
    """What this machine lacks for a fault."""


@dataclass(frozen=True)
class Ended:
    status: int
    output: str
    seconds: float


def start(command: list[str], root: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=root, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], started: float) -> Ended:
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        kill(process)
        output = f"no end after {SECONDS} s"
    return Ended(process.returncode, output, time.monotonic() - started)


def run(command: list[str], root: Path, env: dict[str, str]) -> Ended:
    started = time.monotonic()
    return ended(start(command, root, env), started)


def kill(process: subprocess.Popen[str]) -> None:
    """The verb and all that it started, as when a machine stops."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def killed(command: list[str], root: Path, env: dict[str, str], delay: float) -> bool:
    """Whether it was still running."""
    process = start(command, root, env)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=delay)
        return False
    kill(process)
    return True


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"mount: {done.stderr.strip() or 'not permitted'}")


@contextlib.contextmanager
def small_disk(root: Path) -> Iterator[Path]:
    """All that is written below `root` goes to a file system of its own, and with it."""
    with tempfile.TemporaryDirectory() as place:
        disk = Path(place)
        mount("-t", "tmpfs", "-o", AMPLE, "none", place)
        try:
            upper, scratch = disk / "upper", disk / "scratch"
            upper.mkdir()
            scratch.mkdir()
            layers = f"redirect_dir=on,lowerdir={root},upperdir={upper},workdir={scratch}"
            mount("-t", "overlay", "-o", layers, "overlay", str(root))
            try:
                yield disk
            finally:
                subprocess.run(["umount", "--lazy", str(root)], check=True)
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)


def used(disk: Path) -> int:
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@contextlib.contextmanager
def full(disk: Path, extra: int) -> Iterator[None]:
    """Only so many more bytes fit, rounded up to whole pages."""
    mount("-o", f"remount,size={used(disk) + max(extra, 4096)}", str(disk))  # 0: no limit
    try:
        yield
    finally:
        mount("-o", f"remount,{AMPLE}", str(disk))


def read_only(command: list[str], root: Path, env: dict[str, str], delay: float) -> Ended:
    """The checkout cannot be written from a moment on; what is open then stays writable."""
    started = time.monotonic()
    process = start(command, root, env)
    with contextlib.suppress(subprocess.TimeoutExpired):
        output, _ = process.communicate(timeout=delay)
        return Ended(process.returncode, output, time.monotonic() - started)
    mount("--bind", "-o", "ro", str(root), str(root))
    try:
        return ended(process, started)
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


def moment(seconds: float, generator: random.Random) -> float:
    return generator.uniform(0, seconds)
