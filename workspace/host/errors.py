# SPDX-License-Identifier: Apache-2.0
"""The one error that verbs raise on purpose, and how whatever ends a verb is told: in one line."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path

CLOSED_PIPE = 141
"""The exit status of a program whose reader left (`| head`): 128 + SIGPIPE, as a shell has it."""


class WorkspaceError(Exception):
    """Something the user can act on.

    The message is one line: what happened, where, and what to run or change.
    The command line prints it without a traceback and exits with status 1.
    """


@contextlib.contextmanager
def told_in_one_line(place: Path | None = None) -> Iterator[None]:
    """End the program with one line and an exit status, whatever ends the verb inside.

    `place` is named where the system's own error does not say which file it is about.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # what nobody reads shows here, not when Python is ending
    except WorkspaceError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again to go on")
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in (1, 2):  # Python flushes both once more
                os.dup2(nowhere, descriptor)
            sys.exit(CLOSED_PIPE)
        where = f": {name}" if (name := error.filename or place) else ""
        what = error.strerror or error
        sys.exit(f"error: {what}{where}; set that right and run the command again")


def _nobody_reads() -> bool:
    """Whether our own output goes into a pipe that its reader has closed."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
