# SPDX-License-Identifier: Apache-2.0
"""The watch's end of a fork server: start it, ask it, kill it or its child."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from multiprocessing import Pipe
from typing import Any

from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT
from workspace.watch.messages import Answer, Crashed, Question


class ForkServer:
    """One fork server and the child that works in it.

    Args:
        interpret: run Triton kernels in the interpreter.
    """

    def __init__(self, *, interpret: bool) -> None:
        environment = {
            name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
        }
        # Asking for a GPU through NVML does not initialize CUDA, after which no fork could use it.
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        environment["OPENBLAS_NUM_THREADS"] = "1"  # no threads before a fork
        if interpret:
            environment["TRITON_INTERPRET"] = "1"
        self._connection, its_end = Pipe()
        # In a session of its own: Ctrl-C goes to the watch, which then kills this.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workspace.watch.fork_server", str(its_end.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[its_end.fileno()],
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
        its_end.close()
        self._child: int | None = None

    def wait_until_ready(self) -> None:
        self._receive()

    def ask(self, question: Question) -> Answer:
        """The answer of a child, killed if it takes longer than the question's timeout.

        Raises:
            WorkspaceError: the server itself has ended.
        """
        with contextlib.suppress(BrokenPipeError):  # _receive reports it
            self._connection.send(question)
        self._child = self._receive().child
        try:
            if self._connection.poll(question.timeout):
                answer: Answer = self._receive()
                return answer
            self.kill_child()
            self._receive()
            return Crashed("hangs", f"no answer in {question.timeout:g} s: killed")
        finally:
            self._child = None

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            raise WorkspaceError(
                "the process that compiles kernels has ended; run make watch again"
            ) from None

    def kill_child(self) -> None:
        child = self._child
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)

    def close(self) -> None:
        self.kill_child()
        self.process.kill()
        self.process.wait()
