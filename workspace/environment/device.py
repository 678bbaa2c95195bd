# SPDX-License-Identifier: Apache-2.0
"""What the engine runs on."""

from __future__ import annotations

import os
from pathlib import Path

from workspace.host.errors import WorkspaceError


def device() -> str:
    """DEVICE= if given, else cuda where the NVIDIA driver (or WSL's) made a GPU device."""
    asked = os.environ.get("DEVICE")
    if asked in ("cuda", "cpu"):
        return asked
    if asked:
        raise WorkspaceError(f"DEVICE={asked} is not known; give DEVICE=cuda or DEVICE=cpu")
    # A look at the device files, because asking nvidia-smi can take seconds.
    found = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    return "cuda" if found else "cpu"
