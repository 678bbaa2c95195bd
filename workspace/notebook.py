# SPDX-License-Identifier: Apache-2.0
"""`make notebook`: JupyterLab for notebooks/, reachable from this machine only."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys

from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT
from workspace.host.text import say

NOTEBOOKS = ROOT / "notebooks"


def command() -> list[str]:
    """On loopback and with Jupyter's random token: who opens a notebook runs code as this user."""
    # -P: a folder kernels/ in the current folder must not be imported as the package of that name.
    return [
        sys.executable, "-P", "-m", "jupyterlab", "--ip=127.0.0.1", "--no-browser",
        f"--ServerApp.root_dir={NOTEBOOKS}",
        *(["--allow-root"] if os.geteuid() == 0 else []),  # in a container one may be root
    ]  # fmt: skip


def run() -> None:
    """Run until the user stops it; Jupyter prints the address with its token.

    Raises:
        WorkspaceError: JupyterLab is not installed.
    """
    if importlib.util.find_spec("jupyterlab") is None:
        raise WorkspaceError(
            f"JupyterLab is not installed for {sys.executable}; install the package jupyterlab, "
            "or use an environment of the workspace (make dev)"
        )
    say("JupyterLab prints its address; press Ctrl-C twice to stop it")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.Popen(command(), cwd=NOTEBOOKS, env=environment)
    # Jupyter handles Ctrl-C: it asks before it stops its kernels.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGINT, previous)
    if status > 0:
        raise WorkspaceError(f"JupyterLab ended with status {status}; see its messages")
