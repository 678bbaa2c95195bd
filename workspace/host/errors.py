# SPDX-License-Identifier: Apache-2.0
"""The error that verbs raise on purpose, and how the end of a verb is reported: in one line."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path

CLOSED_PIPE = 141
"""The exit status of a program whose reader closed the pipe (`| head`): 128 + SIGPIPE."""
INTERRUPTED = 130
"""After Ctrl-C: 128 + SIGINT."""


class WorkspaceError(Exception):
    """Something the user can act on, in one line: what happened, where, what to run or change.

    It is printed without a traceback, and the exit status is 1.
    """


def require(package: str) -> None:
    """Raise if this Python cannot import a package, as on a host without the development tools."""
    if importlib.util.find_spec(package) is None:
        raise WorkspaceError(
            f"{package} is not installed for {sys.executable}; install the package {package}, "
            "or use an environment of the workspace (make dev)"
        )


@contextlib.contextmanager
def reported_in_one_line(folder: Path | None = None) -> Iterator[None]:
    """End the program with one line and an exit status, whatever exception the verb raises.

    `folder` is named if an error of the operating system does not name a file.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # a closed pipe is noticed here, not while Python exits
    except WorkspaceError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            null = os.open(os.devnull, os.O_WRONLY)
            for descriptor in (1, 2):  # Python flushes both once more
                os.dup2(null, descriptor)
            sys.exit(CLOSED_PIPE)
        where = f": {name}" if (name := error.filename or folder) else ""
        what = error.strerror or error
        sys.exit(f"error: {what}{where}; fix that and re-run")


def _output_is_closed() -> bool:
    """Whether standard output or error is a pipe that its reader has closed."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
