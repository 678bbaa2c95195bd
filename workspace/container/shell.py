# SPDX-License-Identifier: Apache-2.0
"""`make shell`: a shell, or one command, in the container of this checkout."""

from __future__ import annotations

import os
import subprocess
import sys

from workspace import verbs
from workspace.container import start
from workspace.container.docker import client

PASSED_ON = ("HF_TOKEN", "HF_ENDPOINT", "TERM", "COLORTERM")
"""Passed on from the host, for this command only: unlike those of `docker run`, variables of
`docker exec` are not part of the container's settings, and so not of an image."""


def run(options: verbs.Shell) -> int:
    """Run CMD=, or an interactive shell; returns its exit status."""
    identity = start.running().identity
    command = [client(), "exec", "--interactive"]
    command += ["--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    for name in PASSED_ON:
        # Without a value: Docker reads it from this process, and no process list shows it.
        command += ["--env", name] if os.environ.get(name) else []
    command += [identity, "bash", *(["-lc", options.cmd] if options.cmd else ["-l"])]
    return subprocess.run(command, check=False).returncode
