# SPDX-License-Identifier: Apache-2.0
"""CUSTOM_KERNELS_FUSE: which quantizations a pass over vLLM's graphs fuses, and that the engine
computes the same with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kernels import vllm_program
from workspace.bench import models
from workspace.bench.models import DUMMY_FORMAT
from workspace.host.paths import ROOT


@pytest.fixture(autouse=True)
def _norms_are_nodes() -> None:
    pytest.importorskip("vllm.ir", reason="norms are no nodes of this vLLM's graphs")


# --- the pass -------------------------------------------------------------------------------------

# Graphs as AOTAutograd makes them of what vLLM's modules and our linear methods call.
PASS = """
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
import vllm.ir.ops
from vllm.model_executor.layers.activation import SiluAndMul
from custom_kernels import custom_quant_expand, custom_silu_mul_quant
from custom_kernels.vllm import upstream_fusion as fusion

ir, act = torch.ops.vllm_ir, SiluAndMul.forward_native
x, residual = torch.randn(2, 5, 64).bfloat16()
wide, weight = torch.randn(5, 128).bfloat16(), torch.randn(64).bfloat16()
long, longer = torch.randn(1, 16_384).bfloat16(), torch.randn(1, 98_304).bfloat16()

def quantized(y, pattern="6:8", dtype=torch.int8):
    return custom_quant_expand(y, pattern, dtype)

def shared(y):
    return *quantized(y), y

def of_a_residual():
    y, total = ir.fused_add_rms_norm(x, residual, weight, 1e-5)
    return *quantized(y, None), total

FUNCTIONS = {
    "norm": (lambda: quantized(ir.rms_norm(x, weight, 1e-6))),
    "norm of a residual": of_a_residual,
    "activation": (lambda: quantized(act(wide), "2:4", torch.float8_e4m3fn)),
    "both, quantized twice alike": (
        lambda: (*quantized(act(wide)), *quantized(ir.rms_norm(x, weight, 1e-6)))
    ),
    "norm with another user": (lambda: shared(ir.rms_norm(x, weight, 1e-6))),
    "norm of a part": (lambda: quantized(ir.rms_norm(x, weight, 1e-6, 32))),
    "norm without weight": (lambda: quantized(ir.rms_norm(x, None, 1e-6))),
    "norm with a weight in float32": (
        lambda: quantized(ir.rms_norm(x, weight.float(), 1e-6).bfloat16())
    ),
    "activation with another user": (lambda: shared(act(wide))),
    "long norm": (lambda: quantized(ir.rms_norm(long, long[0], 1e-6))),
    "long activation": (lambda: quantized(act(longer))),
    "other halves": (
        lambda: quantized(torch.nn.functional.silu(wide[:, :32]) * wide[:, 32:64])
    ),
}
inputs = dict(x=x, residual=residual, wide=wide, weight=weight, long=long, longer=longer)
for name, function in FUNCTIONS.items():
    def traced(given):
        globals().update(given)
        try:
            return function()
        finally:
            globals().update(inputs)
    graph = make_fx(traced, select_decomp_table(), tracing_mode="fake")(inputs)
    wanted = function()
    work = fusion.FuseQuantization()
    work(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    ours = sorted(
        node.target._opname for node in graph.graph.nodes if "custom_kernels" in str(node.target)
    )
    for one, other in zip(graph(inputs), wanted, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        if one.dtype == torch.bfloat16:
            torch.testing.assert_close(one, other)
        elif one.dtype == torch.float32:
            torch.testing.assert_close(one, other, rtol=0.01, atol=0)
        else:
            step = 1 if one.dtype == torch.int8 else 32
            assert (one.float() - other.float()).abs().max() <= step
    for node in graph.graph.nodes:
        assert node.op in ("output", "placeholder") or "val" in node.meta, node
    print(name, ours)
"""

FUSED = {
    "norm": ["rms_norm_quant"],
    "norm of a residual": ["rms_norm_quant"],
    "activation": ["silu_mul_quant"],
    "both, quantized twice alike": ["rms_norm_quant", "silu_mul_quant"],
}
KEPT = (
    "norm with another user",
    "norm of a part",
    "norm without weight",
    "norm with a weight in float32",
    "activation with another user",
    "long norm",
    "long activation",
    "other halves",
)


@pytest.mark.slow
def test_a_quantization_is_fused_with_what_nothing_else_uses() -> None:
    lines, _ = vllm_program.run(PASS)
    assert lines == [
        *(f"{name} {operations}" for name, operations in FUSED.items()),
        *(f"{name} ['quant_expand']" for name in KEPT),
    ]


# --- the engine -----------------------------------------------------------------------------------

# On the CPU vLLM compiles without its own passes: here it is made to compile as on a GPU.
ENGINE = """
import json, sys
sys.path.insert(0, sys.argv[2])
import workspace.bench.dummy_weights
from custom_kernels import launches
from custom_kernels.vllm import upstream, upstream_fusion
from vllm import LLM, SamplingParams
from vllm.config import CompilationMode
from vllm.platforms.cpu import CpuPlatform

update = CpuPlatform.check_and_update_config
def compile_as_on_a_gpu(config):
    update(config)
    compilation = config.compilation_config
    if compilation.mode != CompilationMode.NONE:
        compilation.mode, compilation.backend = CompilationMode.VLLM_COMPILE, "inductor"
        compilation.ir_enable_torch_wrap, compilation.compile_sizes = True, []
for log in (upstream.log, upstream_fusion.log):  # vLLM sets up logging anew when it starts
    log.info = log.warning = lambda text, *values: print(text % values, file=sys.stderr)
CpuPlatform.check_and_update_config = staticmethod(compile_as_on_a_gpu)

model = LLM(
    sys.argv[1], quantization="sparse_6_8", load_format=sys.argv[3], max_model_len=128,
    enforce_eager=sys.argv[4] == "eager", max_num_seqs=8, max_num_batched_tokens=128,
)
prompts = [{"prompt_token_ids": [40 + i, 70, 90 - i, 110, 65]} for i in range(4)]
options = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
steps = [
    [
        (token, sorted((one.logprob for one in likely.values()), reverse=True))
        for token, likely in zip(made.outputs[0].token_ids, made.outputs[0].logprobs)
    ]
    for made in model.generate(prompts, options)
]
print(json.dumps([steps, launches.counts()]))
"""


Step = tuple[int, tuple[float, float]]
"""A token, and the log-probabilities of the two most likely ones."""


@pytest.mark.engine
@pytest.mark.slow
def test_all_norms_but_the_last_and_all_activations_of_an_engine_are_fused(tmp_path: Path) -> None:
    model = models.resolve(models.TINY, "cpu", tmp_path)
    layers = model.config.num_hidden_layers

    def run(mode: str, **switches: str) -> tuple[list[list[Step]], dict[str, int], str]:
        lines, errors = vllm_program.run(
            ENGINE, str(model.folder), str(ROOT), DUMMY_FORMAT, mode,
            VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_HOST_IP="127.0.0.1", HF_HUB_OFFLINE="1", VLLM_CACHE_ROOT=str(tmp_path / "cache"),
            TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"), **switches,
        )  # fmt: skip
        steps, counts = json.loads(lines[-1])
        return steps, counts, "\n".join(lines) + errors

    fused, counts, said = run("compiled")
    passes, rest = divmod(counts["sparse_gemm.reference"], 4 * layers)
    assert not rest
    assert counts == {
        "rms_norm_quant.reference": 2 * layers * passes,
        "silu_mul_quant.reference": layers * passes,
        "quant_expand.reference": layers * passes,  # of what attention returns
        "sparse_gemm.reference": 4 * layers * passes,
    }
    assert f"quantization is part of {layers} activations, {2 * layers} norms" in said

    unfused, counts, said = run("eager", CUSTOM_KERNELS_FUSE="1")
    assert set(counts) == {"quant_expand.reference", "sparse_gemm.reference"}
    assert "nothing is fused: vLLM's passes do not see norms here (compilation mode NONE)" in said
    # What torch.compile leaves out in roundings decides where two tokens are equally likely.
    agreeing = 0
    for one, other in zip(fused, unfused, strict=True):
        for (token, (best, _)), (right, (likely, next_best)) in zip(one, other, strict=True):
            if token != right:
                assert likely - next_best < 0.1
                break
            assert abs(best - likely) < 0.3
            agreeing += 1
    assert agreeing >= 30
