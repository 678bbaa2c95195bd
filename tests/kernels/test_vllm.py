# SPDX-License-Identifier: Apache-2.0
"""How the operations enter vLLM: the plugin, and the hook that the fork calls."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest

PROGRAM = """
import logging, os
import torch
from custom_kernels import launches, registry
from custom_kernels.vllm.plugin import register

register()
assert hasattr(torch.ops.custom_kernels, "gemm")
from custom_kernels.gemm import cublaslt
assert cublaslt.plan_smaller_batches

from custom_kernels.vllm import gemm_hook
layer = torch.nn.Linear(40, 24)
x = torch.randn(6, 40)
weight, bias = layer.weight.detach(), layer.bias.detach()
wanted = torch.nn.functional.linear(x, weight, bias)
assert torch.equal(gemm_hook.custom_unquantized_gemm(layer, x, weight, bias), wanted)

@torch.compile(backend="eager", fullgraph=True)
def model(x):
    return gemm_hook.custom_unquantized_gemm(layer, x, weight, bias)

assert torch.equal(model(x), wanted)
assert launches.counts() == {"gemm.reference": 2}, launches.counts()
print("traced")

gemm_hook.choose_backend.cache_clear()
os.environ["VLLM_CUSTOM_GEMM_BACKEND"] = "cublastl"
try:
    gemm_hook.custom_unquantized_gemm(layer, x, weight, bias)
except registry.BackendError as error:
    print(error)

os.environ["VLLM_CUSTOM_GEMM_BACKEND"] = "reference"
logging.basicConfig(format="%(message)s")
takes = registry.takes
registry.takes = lambda *arguments: False
registry.best = lambda *arguments: "other"
print(gemm_hook.choose_backend("cpu", torch.float32))
print(gemm_hook.choose_backend("cpu", torch.float32))
"""


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="custom_kernels")
    if not found:
        pytest.skip("the package custom-kernels is not installed here: run `make dev`")
    (entry,) = {entry.value for entry in found}
    assert entry == "custom_kernels.vllm.plugin:register"


@pytest.mark.slow
def test_the_hook_is_one_op_and_a_wrong_backend_one_line() -> None:
    pytest.importorskip("vllm")
    environment = {**os.environ, "VLLM_USE_CUSTOM_GEMM": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    for name in ("VLLM_CUSTOM_GEMM_BACKEND", "TRITON_INTERPRET"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-4:] == [
        "traced",
        "gemm cannot use backend 'cublastl' on cpu: there is no such backend; available: reference",
        "other",
        "other",
    ]
    said = "gemm: reference does not take torch.float32, layers of that dtype run with other"
    assert result.stderr.count(said) == 1
