# SPDX-License-Identifier: Apache-2.0
"""The folder of this package, of its checkout, and of compiled kernels."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """The root of the checkout that contains this package; None if it is installed elsewhere."""
    root = PACKAGE.parents[1]
    return root if (root / "pins.toml").is_file() else None


def cache_dir() -> Path:
    """Where compiled libraries are kept: ``$CUSTOM_KERNELS_CACHE``, the checkout's
    ``.workspace/kernels``, or the user's cache folder."""
    if configured := os.environ.get("CUSTOM_KERNELS_CACHE"):
        return Path(configured)
    if root := checkout():
        return root / ".workspace" / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "custom_kernels"
