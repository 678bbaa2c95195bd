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
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LOG_SECONDS = 25.0
"""A log gets a line this often: what is silent for longer looks as if it hung."""


class LoggedProgress(Progress):
    """Rich's progress display; where lines cannot be redrawn, a line every `LOG_SECONDS` instead.

    That line has the text of the same columns, without bars and spinners.
    """

    def __init__(
        self, *columns: ProgressColumn, console: Console | None = None, transient: bool = True
    ) -> None:
        console = console or Console(stderr=True)
        # FORCE_COLOR makes a log look like a terminal to Rich; it still cannot redraw a line.
        self.redraws = console.is_interactive and console.file.isatty()
        super().__init__(*columns, console=console, transient=transient, disable=not self.redraws)
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
                    self.console.print(
                        self._line(task), markup=False, highlight=False, soft_wrap=True
                    )

    def _line(self, task: Task) -> str:
        columns = (column for column in self.columns if isinstance(column, ProgressColumn))
        return " ".join(
            str(column(task))
            for column in columns
            if not isinstance(column, BarColumn | SpinnerColumn)
        )


def bytes_progress() -> LoggedProgress:
    """For a download, or a large file being written: each task's total is in bytes."""
    return LoggedProgress(
        TextColumn("· {task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
