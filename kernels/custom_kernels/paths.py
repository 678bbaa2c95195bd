# SPDX-License-Identifier: Apache-2.0
"""Where this package lies, the checkout that holds it, and where compiled kernels are kept."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """The root of the checkout that this package lies in, None when it is installed elsewhere."""
    root = PACKAGE.parents[1]
    return root if (root / "pins.toml").is_file() else None


def cache_dir() -> Path:
    """Where compiled libraries live: ``$CUSTOM_KERNELS_CACHE``, the checkout's
    ``.workspace/kernels``, or the user's cache folder."""
    if configured := os.environ.get("CUSTOM_KERNELS_CACHE"):
        return Path(configured)
    if root := checkout():
        return root / ".workspace" / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "custom_kernels"
