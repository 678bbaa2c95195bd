# SPDX-License-Identifier: Apache-2.0
"""Programs that use vLLM's layers without an engine, in processes of their own: vLLM reads its
switches, and finds its plugins, when it starts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SWITCHES = ("VLLM_USE_CUSTOM_GEMM", "VLLM_CUSTOM_GEMM_BACKEND", "VLLM_CUSTOM_GEMM_LAYERS")

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


def run(program: str, *arguments: str, **switches: str) -> tuple[list[str], str]:
    """Lines that the program printed, and what it wrote to stderr. It must end well."""
    pytest.importorskip("vllm")
    inherited = {k: v for k, v in os.environ.items() if k not in (*SWITCHES, "TRITON_INTERPRET")}
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=inherited | {"VLLM_LOGGING_LEVEL": "ERROR"} | switches,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines(), result.stderr
