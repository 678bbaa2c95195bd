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
STATE = ROOT / ".workspace"
"""What the workspace makes for this checkout: locks, logs, models, runs, compiled kernels."""


def _home() -> Path:
    """WORKSPACE_HOME, where this is the checkout that it is for: a second one in the same
    container must not install its own vLLM there."""
    if os.environ.get("WORKSPACE_HOME_FOR", str(ROOT)) == str(ROOT):
        return Path(os.environ.get("WORKSPACE_HOME") or ROOT)
    return ROOT


HOME = _home()
"""Where environments are: in the checkout; in a container in its image, so that neither the host
nor a container whose checkout it shares takes the other's."""
MACHINE = HOME / ".workspace"
"""What the workspace makes for this machine or container: tools, links to its libraries."""

TOOLS = MACHINE / "tools"
"""uv, and what a bare system lacks."""
HEADERS = STATE / "headers"
"""Headers that a bundle brought, for a host without the package that holds them."""


def cache_root() -> Path:
    """What all checkouts of this user share: $WORKSPACE_CACHE, else vllm-kernels in the user's
    cache folder."""
    given = os.environ.get("WORKSPACE_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else home / "vllm-kernels"


def cache_folder(sha256: str) -> Path:
    """Where a fetched file with this sha256 is kept."""
    return cache_root() / sha256[:16]


def lock_path(version: str, *, gpu: bool = False) -> Path:
    """The lock of a vLLM release; `gpu`: what only a GPU engine needs beside it."""
    return LOCKS / f"vllm-{version}{'-gpu' if gpu else ''}.txt"


def lock_files(version: str, device: str) -> list[Path]:
    """The locks of a vLLM release that an environment for `device` is made from."""
    files = [lock_path(version)]
    return [*files, lock_path(version, gpu=True)] if device == "cuda" else files
