# SPDX-License-Identifier: Apache-2.0
"""Progress of long steps: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import threading

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LOG_SECONDS = 25.0
"""Seconds between lines in a log, so that a long step does not look like a hang."""


class LoggedProgress(Progress):
    """Rich's progress display; if lines cannot be redrawn, a line every `LOG_SECONDS` with the text
    of the same columns, without bars and spinners."""

    def __init__(
        self, *columns: ProgressColumn, console: Console | None = None, transient: bool = True
    ) -> None:
        console = console or Console(stderr=True)
        # With FORCE_COLOR Rich takes a log for a terminal, in which lines can be redrawn.
        self.redraws = console.is_interactive and console.file.isatty()
        super().__init__(*columns, console=console, transient=transient, disable=not self.redraws)
        graphic = (BarColumn, SpinnerColumn)
        self._text_columns = [column for column in columns if not isinstance(column, graphic)]
        self._stopped = threading.Event()

    def start(self) -> None:
        super().start()
        if not self.redraws:
            threading.Thread(target=self._log, daemon=True).start()

    def stop(self) -> None:
        super().stop()
        self._stopped.set()

    def _log(self) -> None:
        while not self._stopped.wait(LOG_SECONDS):
            for task in self.tasks:
                if task.visible:
                    line = " ".join(str(column(task)) for column in self._text_columns)
                    self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def bytes_progress() -> LoggedProgress:
    """For a download or a large file being written: the totals of tasks are in bytes."""
    return LoggedProgress(
        TextColumn("· {task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
