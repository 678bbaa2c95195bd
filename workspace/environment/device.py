# SPDX-License-Identifier: Apache-2.0
"""What the engine runs on."""

from __future__ import annotations

from pathlib import Path

from workspace.host import settings


def device() -> settings.Device:
    """DEVICE= if given, else cuda where the NVIDIA driver (or WSL's) made a GPU device."""
    if asked := settings.current().device:
        return asked
    # A look at the device files, because asking nvidia-smi can take seconds.
    found = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    return "cuda" if found else "cpu"
