# SPDX-License-Identifier: Apache-2.0
"""`make shell`: a shell, or one command, in the container of this checkout."""

from __future__ import annotations

import os
import subprocess
import sys

from workspace import verbs
from workspace.container import start
from workspace.container.docker import client

HANDED_ON = ("HF_TOKEN", "HF_ENDPOINT", "TERM", "COLORTERM")
"""Taken along from the host, for this command only: what `docker exec` is given, unlike what
`docker run` is, is no part of the container's settings, and so of no image."""


def run(options: verbs.Shell) -> int:
    """Run CMD=, or an interactive shell; returns its exit status."""
    identity = start.running()["Id"]
    command = [client(), "exec", "--interactive"]
    command += ["--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    for name in HANDED_ON:
        # Without a value: Docker takes it from this process, and no process list shows it.
        command += ["--env", name] if os.environ.get(name) else []
    command += [identity, "bash", *(["-lc", options.cmd] if options.cmd else ["-l"])]
    return subprocess.run(command, check=False).returncode
