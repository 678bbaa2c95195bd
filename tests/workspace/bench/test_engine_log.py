# SPDX-License-Identifier: Apache-2.0
"""Why an engine failed: the cause in the process that failed first, and not what others made of
it."""

import subprocess
import sys

import pytest

from workspace.bench.engine_log import explain

VAGUE = "RuntimeError: Engine core initialization failed. See root cause above. "


def traceback(*exceptions: str, header: str = "", link: str = "") -> str:
    """A log with a chain of exceptions, each line behind `header`, as vLLM's logger writes it."""
    parts = [
        "Traceback (most recent call last):\n"
        '  File "engine.py", line 1, in start\n'
        "    raise RuntimeError(\n"
        f"          ^^^^^^\n{exception}"
        for exception in exceptions
    ]
    lines = f"\n\n{link}\n\n".join(parts).splitlines()
    return "".join(f"{header}{line}\r\n" for line in lines)


CAUSED = "The above exception was the direct cause of the following exception:"
DURING = "During handling of the above exception, another exception occurred:"
CORE = "(EngineCore pid=5) ERROR 11-26 09:54:14 [core.py:9] "
FIRST = "(Worker_TP1 pid=7) ERROR 11-26 09:54:13 [multiproc_executor.py:9] "
SECOND = "(Worker_TP0 pid=6) ERROR 11-26 09:54:13 [multiproc_executor.py:9] "


@pytest.mark.parametrize(
    ("log", "says"),
    [
        (traceback("ValueError: bad shape"), "ValueError: bad shape"),
        ("INFO x\nKeyError: 'a'\n", "KeyError: 'a'"),
        (traceback("RecursionError: too deep", header="[rank0]: "), "RecursionError: too deep"),
        (traceback("OSError: no file", "KeyError: 1", link=CAUSED), "OSError: no file"),
        (traceback("OSError: no file", "KeyError: 1", link=DURING), "OSError: no file"),
        (
            traceback("ImportError: no libfoo", header=CORE) + traceback(VAGUE),
            "ImportError: no libfoo",
        ),
        # The first worker that failed, whatever befell the others and whoever passed it on.
        (
            traceback("ValueError: too big", header=FIRST)
            + traceback("ConnectionResetError: peer", header=SECOND)
            + traceback("asyncio.exceptions.CancelledError", header=FIRST)
            + traceback("RuntimeError: Worker failed, see the root cause", header=CORE)
            + traceback(VAGUE),
            "ValueError: too big",
        ),
        # Lines of two processes that write at the same time.
        (
            "".join(
                f"{one}\n{other}\n"
                for one, other in zip(
                    traceback("ValueError: mine", header=CORE).splitlines(),
                    traceback(VAGUE).splitlines(),
                    strict=True,
                )
            ),
            "ValueError: mine",
        ),
        # What was got over is not the cause.
        (
            traceback("ImportError: plugin", header="ERROR 11-26 09:54:14 [plugins.py:9] ")
            + "INFO 11-26 09:54:15 [core.py:9] all is well\n"
            + traceback("ValueError: the end"),
            "ValueError: the end",
        ),
        # A server's, of which its client only says that it has ended.
        (
            traceback("OSError: no such model", header="(APIServer pid=5) ")
            + traceback("RuntimeError: vLLM's server ended with status 1"),
            "OSError: no such model",
        ),
        (traceback("torch.Error: first\nsecond\n  third"), "torch.Error: first second third"),
        (
            traceback(
                "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
                "  Value error, no such architecture [type=value_error, input_value=…]\n"
                "    For further information visit a page"
            ),
            "ValidationError: ModelConfig: no such architecture",
        ),
        (
            traceback("torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB", header=CORE)
            + traceback(VAGUE),
            "out of memory (torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB); use a smaller"
            " MODEL or a larger TP",
        ),
        ("\x1b[31mFatal Python error: Segmentation fault\x1b[0m\n", "Fatal Python error: Segm"),
        ("vllm bench throughput: error: argument --x: y\n", "vllm bench throughput: error: arg"),
    ],
)
def test_the_cause_is_found(log: str, says: str) -> None:
    found = explain(log, 1)
    assert found.startswith(says)
    assert "\n" not in found


@pytest.mark.parametrize(
    ("log", "status", "says"),
    [
        ("INFO all is well\n", -9, "killed (signal 9)"),
        (traceback(f"{VAGUE}Failed core proc(s): {{'EngineCore': -9}}"), 1, "killed (signal 9)"),
        (
            "(EngineCore pid=5) ERROR 11-26 09:54:14 [x.py:1] Worker proc VllmWorker-1 died "
            "unexpectedly, shutting down executor.\n" + traceback(VAGUE),
            1,
            "killed (signal 9)",
        ),
        (traceback("RuntimeError: vLLM's server ended with status -9"), 1, "killed (signal 9)"),
        (traceback("RuntimeError: vLLM's server ended with status 3"), 1, "with status 3"),
        ("INFO all is well\n", -11, "SIGSEGV"),
        (
            "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  x\n",
            -6,
            "out of memory (terminate called",
        ),
        ("", 3, "status 3"),
        (traceback(VAGUE), 1, "Engine core initialization failed"),
    ],
)
def test_without_a_traceback_the_status_speaks(log: str, status: int, says: str) -> None:
    assert says in explain(log, status)


def test_what_python_itself_prints_is_understood() -> None:
    code = (
        "from pydantic import BaseModel\n"
        "class Shape(BaseModel):\n    tokens: int\n"
        "try:\n    Shape(tokens='many')\n"
        "except ValueError as error:\n    raise RuntimeError(\n'cannot\\nstart'\n) from error\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    found = explain(done.stderr, done.returncode)
    assert found == (
        "ValidationError: Shape: Input should be a valid integer, unable to parse string as an "
        "integer"
    )
