# SPDX-License-Identifier: Apache-2.0
"""A process that has imported what kernels need and forks a child for every question.

    python -m workspace.watch.fork_server

It reads a question per line (JSON) and answers with two lines: the child's process id, then what
came of it. Importing torch, Triton and CuPy takes seconds; a fork takes milliseconds, and its child
imports the kernel as it is now. The child may crash or hang: nothing else does. This process itself
never touches the GPU, or its children could not.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from dataclasses import asdict
from importlib import import_module
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch", "triton", "triton.language", "triton.compiler", "triton.backends.nvidia.compiler",
    "cupy", "cupy_backends.cuda.libs.nvrtc", "tvm_ffi", "rich.table",
    # What the first call of an operator of ours makes torch import.
    "torch._dynamo", "torch._higher_order_ops.triton_kernel_wrap", "torch.testing",
    "triton.experimental.gluon.nvidia.hopper",
    "custom_kernels.inspection", "custom_kernels.checking", "custom_kernels.timing",
    "concurrent.futures.process", "multiprocessing.context",
)  # fmt: skip
MOST_VARIANTS = 4
"""Of a Triton kernel, compiled for a verdict: it should come in seconds. `make inspect` shows
all."""
TIMED_TOKENS = (16, 4096)
TIMED_SECONDS = 0.05
MOST_OUTPUT = 4000
"""Characters that are kept of what a crashed child printed."""


def main() -> None:
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # a question that needs it will say so
            import_module(name)
    # Nobody else must find bytecode of a file that was saved a moment later, see _forget_bytecode.
    sys.dont_write_bytecode = True
    # Of a fork beside threads: what libraries started at import waits for work, and holds no lock.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        answer(json.loads(line))


def answer(question: dict[str, Any]) -> None:
    """Fork, print the child's id, wait for it, print what it found or how it ended."""
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as printed:
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            _child(question, writing)
        os.close(writing)
        print(json.dumps({"child": child}), flush=True)
        with os.fdopen(reading, "rb") as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        found: dict[str, Any]
        if text:
            found = json.loads(text)
        else:
            printed.seek(0)
            output = printed.read().decode(errors="replace").strip()[-MOST_OUTPUT:]
            code = os.waitstatus_to_exitcode(status)
            how = signal.strsignal(-code) if code < 0 else f"exit status {code}"
            found = {"crashed": how, "signal": max(0, -code), "output": output}
    print(json.dumps(found), flush=True)


def _child(question: dict[str, Any], writing: int) -> None:
    """Answer and end; never returns."""
    os.setsid()  # so that whatever it starts ends with it
    # Should nobody be left to end it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(question["timeout"]) + 10)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        if "operation" in question:
            _forget_bytecode(question["operation"])
        found = ACTIONS[question["action"]](question)
    except Exception as error:
        from custom_kernels import inspection

        found = {"error": inspection.explain(error), "trace": traceback.format_exc()}
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(json.dumps(found).encode())
    sys.stdout.flush()
    os._exit(0)


def _forget_bytecode(operation: str) -> None:
    """Bytecode is trusted by its source's second and size: not fine enough for quick edits."""
    from custom_kernels import build

    for path in (build.PACKAGE / operation).glob("*.py"):
        Path(cache_from_source(str(path))).unlink(missing_ok=True)


# --- the questions --------------------------------------------------------------------------------


def device(_: dict[str, Any]) -> dict[str, Any]:
    """The GPU's name and architecture, None where there is none."""
    import torch
    from custom_kernels import build

    if not torch.cuda.is_available():
        return {"gpu": None}
    gpu = torch.device("cuda", 0)
    return {"gpu": torch.cuda.get_device_name(gpu), "architecture": build.architecture(gpu)}


def inspect(question: dict[str, Any]) -> dict[str, Any]:
    """Compile for one architecture and read what came out."""
    from custom_kernels import inspection

    operation, backend = question["operation"], question["backend"]
    reports = inspection.compile_here(operation, backend, [question["architecture"]], MOST_VARIANTS)
    return {
        "reports": [asdict(report) for report in reports],
        "warnings": inspection.warnings(reports),
    }


def check(question: dict[str, Any]) -> dict[str, Any]:
    """Check; on a GPU, if all is right, time."""
    import torch
    from custom_kernels import checking, registry

    operation, backend = question["operation"], question["backend"]
    place = torch.device("cuda", 0) if question["gpu"] else torch.device("cpu")
    reason = registry.available(operation, backend, place)
    if reason is not None:
        return {"not_checked": reason}
    checked = checking.check(operation, backend, place, quick=True)
    wrong = [str(one) for one in checked if one.failure is not None]
    if question["gpu"] and wrong:
        try:
            torch.cuda.synchronize(place)
        except RuntimeError:  # everything after the first error says the same
            return {"error": wrong[0]}
    found: dict[str, Any] = {"checked": len(checked), "wrong": wrong}
    if question["gpu"] and not wrong:
        found["times"] = _times(operation, backend, place)
    return found


def _times(operation: str, backend: str, place: Any) -> dict[str, dict[str, Any]]:
    """Microseconds of one call with few tokens and with many, and the ratio to the baseline."""
    from custom_kernels import bench, checking, timing

    definition = checking.definition(operation)
    dtype = checking.dtypes(operation, backend, place)[0]
    exact = import_module(f"custom_kernels.{operation}.reference").exact
    contender = bench.contender_of(operation, backend, place, dtype, definition)
    baseline = next(
        (one for one in definition.baselines(dtype) if one.unavailable(place) is None), None
    )
    sides = [baseline, contender] if baseline and baseline.name != contender.name else [contender]
    found = {}
    for tokens in TIMED_TOKENS:
        case = next(iter(definition.cases(definition.DEFAULT_MODELS[-1:], (tokens,), dtype)))
        results = timing.measure(case, sides, exact, place, TIMED_SECONDS, 1).results
        own = results[contender.name]
        found[" ".join(f"{name}={value}" for name, value in case.labels.items())] = {
            "us": own.times.median if own.times else None,
            "ratio": own.ratio,
            "baseline": sides[0].name if len(sides) > 1 else None,
            "failure": own.failure,
        }
    return found


ACTIONS = {"device": device, "inspect": inspect, "check": check}

if __name__ == "__main__":
    main()
