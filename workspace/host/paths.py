# SPDX-License-Identifier: Apache-2.0
"""Where things live in a checkout. Nothing else spells these paths out."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PINS = ROOT / "pins.toml"
LOCKS = ROOT / "locks"
KERNELS = ROOT / "kernels"
FORK = ROOT / "vllm-fork"
PATCHES = FORK / "patches"
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
DIST = ROOT / "dist"
STATE = ROOT / ".workspace"
"""Generated files of this checkout: locks, logs, models, runs, compiled kernels."""


def _home() -> Path:
    """WORKSPACE_HOME, if it is meant for this checkout: a second checkout in the same container
    must not install its vLLM there."""
    if os.environ.get("WORKSPACE_HOME_FOR", str(ROOT)) == str(ROOT):
        return Path(os.environ.get("WORKSPACE_HOME") or ROOT)
    return ROOT


HOME = _home()
"""Where environments are: in the checkout, for a container in its image, because its checkout is
shared with the host."""
MACHINE = HOME / ".workspace"
"""Files for this machine or container: tools, links to its libraries."""

TOOLS = MACHINE / "tools"
"""uv, and what a bare system lacks."""
COMPILE_COMMANDS = ROOT / "compile_commands.json"
CLANGD = ROOT / ".clangd"
HEADERS = STATE / "headers"
"""Headers from a bundle, for a host without the package that holds them."""


def cache_root() -> Path:
    """The cache that all checkouts of this user share."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("WORKSPACE_CACHE") or home / "vllm-kernels")


def cache_folder(sha256: str) -> Path:
    """The folder in the cache for a fetched file with this sha256."""
    return cache_root() / sha256[:16]


def lock_path(version: str, *, gpu: bool = False) -> Path:
    """The lock of a vLLM release; `gpu`: the additional packages of a GPU engine."""
    return LOCKS / f"vllm-{version}{'-gpu' if gpu else ''}.txt"


def lock_files(version: str, device: str) -> list[Path]:
    """The locks of an environment for a vLLM release on `device`."""
    files = [lock_path(version)]
    return [*files, lock_path(version, gpu=True)] if device == "cuda" else files
