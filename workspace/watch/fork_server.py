# SPDX-License-Identifier: Apache-2.0
"""A process that has imported everything kernels need and forks a child for every question.

    python -m workspace.watch.fork_server DESCRIPTOR

It reads questions from the connection DESCRIPTOR (see workspace.watch.messages) and sends two
messages for each: `Started`, then the answer. Importing torch, Triton and CuPy takes seconds; a
fork takes milliseconds, and its child imports the kernel as it is now. Only the child can crash or
hang. This process itself never uses the GPU, or its children could not.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import tempfile
import warnings
from importlib import import_module
from importlib.util import cache_from_source
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

from workspace.watch import messages

if TYPE_CHECKING:
    import torch
    from custom_kernels.operation import Backend

PRELOADED = (
    "torch", "triton", "triton.language", "triton.compiler", "triton.backends.nvidia.compiler",
    "cupy", "cupy_backends.cuda.libs.nvrtc", "tvm_ffi", "rich.table",
    # Imported by torch at the first call of a custom operator.
    "torch._dynamo", "torch._higher_order_ops.triton_kernel_wrap", "torch.testing",
    "triton.experimental.gluon.nvidia.hopper",
    "custom_kernels.inspect.reports", "custom_kernels.check.check", "custom_kernels.bench.timing",
    "concurrent.futures.process", "multiprocessing.context",
)  # fmt: skip
MOST_VARIANTS = 4
"""Variants of a Triton kernel that are compiled for a verdict, which should take seconds; `make
inspect` shows all."""
TIMED_TOKENS = (16, 4096)
TIMED_SECONDS = 0.05
MOST_OUTPUT = 4000
"""Characters kept of a crashed child's output."""


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # reported by the question that needs it
            import_module(name)
    # No other process may find bytecode of a file that was saved a moment later, see
    # _forget_bytecode.
    sys.dont_write_bytecode = True
    # About a fork while threads run: those that libraries started at import are idle and hold no
    # lock.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    connection.send(messages.Ready())
    with contextlib.suppress(EOFError):
        while True:
            answer(connection, connection.recv())


def answer(connection: Connection, question: messages.Question) -> None:
    """Fork, send the child's id, wait for the child, send its answer or how it ended."""
    reading, writing = Pipe(duplex=False)
    with tempfile.TemporaryFile() as printed:
        child = os.fork()
        if child == 0:
            connection.close()
            reading.close()
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            _child(question, writing)
        writing.close()
        connection.send(messages.Started(child))
        pickled = None
        with contextlib.suppress(EOFError, OSError):
            pickled = reading.recv_bytes()
        reading.close()
        _, status = os.waitpid(child, 0)
        if pickled is None:
            connection.send(_crashed(status, printed))
        else:
            connection.send_bytes(pickled)


def _crashed(status: int, printed: IO[bytes]) -> messages.Crashed:
    printed.seek(0)
    output = printed.read().decode(errors="replace").strip()[-MOST_OUTPUT:]
    code = os.waitstatus_to_exitcode(status)
    how = signal.strsignal(-code) if code < 0 else f"exit status {code}"
    return messages.Crashed("crashed", f"{how}\n{output}" if output else f"{how}")


def _child(question: messages.Question, writing: Connection) -> NoReturn:
    """Answer and end."""
    os.setsid()  # the process group that the watch kills
    # In case the watch was killed.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(question.timeout) + 10)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        reply = _answer(question)
    except Exception as error:
        from custom_kernels.inspect.compilers import explain

        reply = messages.Failed(explain(error))
    writing.send(reply)
    sys.stdout.flush()
    os._exit(0)


def _answer(question: messages.Question) -> messages.Answer:
    if isinstance(question, messages.FindDevice):
        return find_device()
    _forget_bytecode(question.operation)
    return inspect(question) if isinstance(question, messages.Inspect) else check(question)


def _forget_bytecode(operation: str) -> None:
    """Delete bytecode: Python trusts it by its source's second and size, too coarse for quick
    edits."""
    from custom_kernels import paths

    for path in (paths.PACKAGE / operation).glob("*.py"):
        Path(cache_from_source(str(path))).unlink(missing_ok=True)


# --- the questions --------------------------------------------------------------------------------


def find_device() -> messages.FoundDevice:
    import torch
    from custom_kernels.compile.sources import architecture

    if not torch.cuda.is_available():
        return messages.FoundDevice()
    gpu = torch.device("cuda", 0)
    return messages.FoundDevice(torch.cuda.get_device_name(gpu), architecture(gpu))


def _backend(question: messages.Inspect | messages.Check) -> Backend:
    from custom_kernels import registry

    return registry.operation(question.operation).backend(question.backend)


def inspect(question: messages.Inspect) -> messages.Inspected:
    from custom_kernels.inspect import reports
    from custom_kernels.inspect.compilers import compile_here

    kernels = compile_here(_backend(question), [question.architecture], MOST_VARIANTS)
    return messages.Inspected(tuple(kernels), tuple(reports.warnings(kernels)))


def check(question: messages.Check) -> messages.Checked | messages.NotChecked | messages.Failed:
    import torch
    from custom_kernels.check import check as checking

    backend = _backend(question)
    device = torch.device("cuda", 0) if question.on_gpu else torch.device("cpu")
    reason = backend.unavailable_reason(device)
    if reason is not None:
        return messages.NotChecked(reason)
    checked = checking.check(backend, device, quick=True)
    wrong = tuple(str(one) for one in checked if one.failure is not None)
    if question.on_gpu and wrong:
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:  # after the first error, every case reports the same one
            return messages.Failed(wrong[0])
    if wrong or not question.on_gpu:
        return messages.Checked(len(checked), wrong)
    times, summary = measure(backend, device, question.shapes)
    return messages.Checked(len(checked), wrong, times, summary)


def measure(
    backend: Backend, device: torch.device, shapes: messages.Shapes | None
) -> tuple[dict[str, messages.Timing], tuple[str, ...]]:
    """The time of each case and its ratio to the baseline; of captured shapes also what the calls
    of the captured run sum up to."""
    from custom_kernels.bench import report, timing
    from custom_kernels.bench.record import Timed, label_text, weighted
    from custom_kernels.bench.shapes import cases as cases_of
    from custom_kernels.bench.shapes import costliest, dtype_of, read
    from custom_kernels.check.case import contender_of
    from custom_kernels.check.check import dtypes

    definition, exact = backend.operation.cases, backend.operation.reference.exact
    supported, captured = dtypes(backend, device), None
    dtype = supported[0]
    if shapes is None:
        cases = [
            next(iter(definition.cases(definition.DEFAULT_MODELS[-1:], (tokens,), dtype)))
            for tokens in TIMED_TOKENS
        ]
    else:
        path = Path(shapes.file)
        capture = read(path)
        if (given := dtype_of(capture, definition)) in supported:
            dtype = given
        cases, captured = costliest(cases_of(capture, definition, dtype), shapes.top, path)
    contender = contender_of(backend, device, dtype)
    baseline = next(
        (one for one in definition.baselines(dtype) if one.unavailable_reason(device) is None), None
    )
    contenders = [contender]
    if baseline is not None and baseline.name != contender.name:
        contenders.insert(0, baseline)
    rows = [timing.measure(case, contenders, exact, device, TIMED_SECONDS, 1) for case in cases]
    times = {}
    for row in rows:
        own, timed = row.contenders[contender.name], row.timed(contender.name)
        times[label_text(row.labels)] = messages.Timing(
            microseconds=timed.us if timed else None,
            ratio=timed.ratio if timed else None,
            baseline=contenders[0].name if len(contenders) > 1 else None,
            failure=None if isinstance(own, Timed) else own.failure,
            calls=row.calls,
        )
    if captured is None:
        return times, ()
    found = weighted(rows, contenders[0].name)
    return times, tuple(report.weighted_lines(captured, rows, found, contenders[0].name))


if __name__ == "__main__":
    main()
