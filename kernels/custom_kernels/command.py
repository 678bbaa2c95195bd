# SPDX-License-Identifier: Apache-2.0
"""What the tools share: their command lines, programs, the screen, whole files."""

import functools
import glob
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from custom_kernels.operation import BackendError
from custom_kernels.tuned import TuningError

if TYPE_CHECKING:
    from rich.console import Console

Main = Callable[[Sequence[str] | None], int]


class UsageError(RuntimeError):
    """The command cannot be carried out. The message is one line with the remedy."""


def command(main: Main) -> Main:
    """A ``main`` that turns an error which the user can fix into one line and exit status 1."""

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except (UsageError, BackendError, TuningError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return run


def exit_with(main: Main) -> NoReturn:
    """Run ``main`` on the command line and end with its status."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader may close the pipe: `| head`
    sys.exit(main(None))


def find_program(name: str, variable: str, places: Sequence[str]) -> str | None:
    """A program of the CUDA toolkit: what an environment variable names, else from PATH, else from
    the first of the places that has it. None if it is nowhere.

    Args:
        places: absolute paths with wildcards; of several matches the last by name is taken.

    Raises:
        UsageError: the variable is set and names no program.
    """
    if given := os.environ.get(variable):
        if found := shutil.which(given):
            return found
        raise UsageError(f"{variable}={given} is not a program")
    installed = (path for place in places for path in sorted(glob.glob(place))[::-1])  # noqa: PTH207 - absolute
    return shutil.which(name) or next(installed, None)


def console(width: int) -> "Console":
    """The terminal; ``width`` columns where the output goes elsewhere."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


def write_whole(path: Path, save: Callable[[Path], object]) -> None:
    """Let ``save`` write a file beside ``path``, and rename it into place when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        save(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
