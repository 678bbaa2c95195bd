# SPDX-License-Identifier: Apache-2.0
"""Programs that use vLLM, each in a process of its own: vLLM reads its switches, and finds its
plugins, when it is used first. Importing vLLM takes longer than most of them, so one process does
that and forks for each program."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from workspace.bench.operations import SWITCHES

ONE_RANK = """
import os, sys
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

def one_rank(store):
    init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
    initialize_model_parallel(1, 1)

def linear(name, n=64, k=64, **more):
    more = {"bias": False} | more
    return ReplicatedLinear(
        k, n, params_dtype=torch.bfloat16, return_bias=False, prefix=name, **more
    )
"""

# Each line of its input is a program to run in a fork: its text, arguments, environment, and the
# files for what it writes.
IMPORTER = """
import json, os, sys, traceback
import vllm._custom_ops
from vllm import LLM
from vllm.model_executor.layers import linear, vocab_parallel_embedding

for line in sys.stdin:
    program, arguments, environment, files = json.loads(line)
    child = os.fork()
    if child == 0:
        for descriptor, name in enumerate(files, 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o644), descriptor)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[1:] = arguments
        status = 1
        try:
            exec(compile(program, "program", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run(
    program: str, *arguments: str, importer: str = IMPORTER, **switches: str
) -> tuple[list[str], str]:
    """Lines that the program printed, and what it wrote to stderr. It must end well."""
    pytest.importorskip("vllm")
    process = _start(importer)
    assert process.stdin is not None
    assert process.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{name}" for name in ("output", "errors")]
        job = [program, arguments, _environment() | switches, files]
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        ended = next((line for line in process.stdout if line.startswith("ended")), "")
        output, errors = (Path(name).read_text() for name in files)
    assert ended == "ended 0\n", errors
    return output.splitlines(), errors


@functools.cache
def _start(importer: str) -> subprocess.Popen[str]:
    """It ends with this process, which closes its input."""
    return subprocess.Popen(
        [sys.executable, "-c", importer],
        env=_environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _environment() -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in (*SWITCHES, "TRITON_INTERPRET")}
    return inherited | {"VLLM_LOGGING_LEVEL": "ERROR"}
