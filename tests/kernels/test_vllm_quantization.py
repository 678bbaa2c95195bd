# SPDX-License-Identifier: Apache-2.0
"""Quantization methods inside vLLM: found, registered, right, traced as two ops."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from custom_kernels import launches, sparsity
from custom_kernels.sparse_gemm import pack, prune_weight, quantize_weight
from custom_kernels.vllm import quantization

from tests.kernels import vllm_program
from workspace.bench import models
from workspace.bench.operations import SWITCHES
from workspace.host.paths import ROOT

PATTERNS = {"sparse_2_4": "2:4", "sparse_4_6": "4:6", "sparse_6_8": "6:8", "sparse_mixed": "mixed"}

PROGRAM = (
    vllm_program.ONE_RANK
    + """
import pickle
from custom_kernels import launches, registry
from custom_kernels.sparse_gemm import prune_weight, quantize_weight, reference
from custom_kernels.vllm import quantization
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.plugins import load_general_plugins

load_general_plugins()
patterns = {"sparse_2_4": "2:4", "sparse_4_6": "4:6", "sparse_6_8": "6:8", "sparse_mixed": "mixed"}
configs = {name: pickle.loads(pickle.dumps(get_quantization_config(name)())) for name in patterns}
print([config.get_name() for config in configs.values()])

def any_number_of_tokens(layer):
    # As the engine traces: once, for whatever number of tokens comes.
    torch._dynamo.reset()
    traced = torch.compile(layer, backend="eager", fullgraph=True)
    for tokens in (7, 64):
        x = torch.randn(tokens, 36).bfloat16()
        torch._dynamo.mark_dynamic(x, 0)  # raises where the trace makes it a constant
        assert torch.equal(traced(x), layer(x))

x = torch.randn(3, 5, 36, dtype=torch.bfloat16)
with set_current_vllm_config(VllmConfig()):
    one_rank(sys.argv[1])
    layers = {
        name: linear(f"model.layers.{i}.mlp.down_proj", 24, 36, quant_config=config, bias=True)
        for i, (name, config) in enumerate(configs.items())
    }
    head = ParallelLMHead(64, 36, quant_config=configs["sparse_2_4"], prefix="lm_head")
print(type(head.quant_method).__name__)
for name, layer in layers.items():
    weight, bias = torch.randn(24, 36).bfloat16(), torch.randn(24).bfloat16()
    layer.weight.weight_loader(layer.weight, weight)
    layer.bias.weight_loader(layer.bias, bias)
    layer.quant_method.process_weights_after_loading(layer)
    assert not hasattr(layer, "weight")
    kept, scale = quantize_weight(prune_weight(weight, patterns[name]), torch.int8)
    wanted = reference.exact(x.view(15, 36), kept, scale, bias, patterns[name]).view(3, 5, 24)
    torch.testing.assert_close(layer(x).double(), wanted, atol=0.01, rtol=0.005)

    graphs = []
    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward
    compiled = torch.compile(layer, backend=keep, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    targets = [str(node.target) for node in graphs[0].graph.nodes if "custom" in str(node.target)]
    print(name, targets, launches.read_layers(sys.argv[2])[os.getpid()][layer.prefix])
    any_number_of_tokens(layer)

with set_current_vllm_config(VllmConfig()):
    method = configs["sparse_6_8"].get_quant_method(layers["sparse_6_8"], "")
try:
    method.create_weights(layers["sparse_6_8"], 36, [24], 72, 24, torch.bfloat16)
except ValueError as error:
    print(error)

import custom_kernels.vllm.quantization as folder
from pathlib import Path
folder.__file__, folder.__path__ = f"{sys.argv[3]}/__init__.py", [sys.argv[3]]
for name, text in (("fp8", ""), ("broken", "import nothing_like_this")):
    Path(sys.argv[3], f"{name}.py").write_text(text)
folder.register()

with set_current_vllm_config(VllmConfig()):
    example = get_quantization_config("int8_channel")()
    layer = linear("model.layers.9.mlp.down_proj", 24, 36, quant_config=example, bias=True)
weight, bias = torch.randn(24, 36).bfloat16(), torch.randn(24).bfloat16()
layer.weight.weight_loader(layer.weight, weight)
layer.bias.weight_loader(layer.bias, bias)
layer.quant_method.process_weights_after_loading(layer)
wanted = reference.dense(*quantize_weight(x.view(15, 36), torch.int8),
                         *quantize_weight(weight, torch.int8), bias).view(3, 5, 24)
torch.testing.assert_close(layer(x).double(), wanted, atol=0.01, rtol=0.005)
assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
print("the example", launches.read_layers(sys.argv[2])[os.getpid()][layer.prefix])
any_number_of_tokens(layer)
"""
)


README = ROOT / "kernels" / "README.md"
EXAMPLE = Path("kernels/custom_kernels/vllm/quantization/int8_channel.py")


def example(language: str) -> str:
    """The code in this language of the README's worked example."""
    section = (
        README.read_text().split("## A quantization method of your own\n")[1].split("\n## ")[0]
    )
    assert f"`{EXAMPLE}`" in section
    (code,) = re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return str(code)


def test_methods_are_found_by_their_files_without_importing_vllm() -> None:
    assert set(PATTERNS) <= set(quantization.names())
    assert not [name for name in quantization.names() if name.startswith("_")]


@pytest.mark.slow
def test_sparse_methods_compute_what_they_say_in_two_ops_and_count_by_layer(
    tmp_path: Path,
) -> None:
    store, log, folder = (tmp_path / name for name in ("store", "log", "folder"))
    folder.mkdir()
    (folder / EXAMPLE.name).write_text(example("python"))
    lines, errors = vllm_program.run(
        PROGRAM, str(store), str(log), str(folder), CUSTOM_KERNELS_LAUNCH_LOG=str(log)
    )
    ops = ["custom_kernels.quant_expand.default", "custom_kernels.sparse_gemm.default"]
    assert lines[-8:] == [
        str(list(PATTERNS)),
        "UnquantizedEmbeddingMethod",
        *(f"{name} {ops} {{'sparse_gemm.reference': 3}}" for name in PATTERNS),
        "sparse_6_8: model.layers.2.mlp.down_proj has K=72, of which each rank gets 36, and these "
        "are no whole groups of 8; use fewer tensor-parallel ranks or another pattern",
        "the example {'int8_channel.torch': 3}",
    ]
    assert "quantization/fp8.py: vLLM has a method 'fp8'; rename the file" in errors
    assert "quantization/broken.py cannot be used: ModuleNotFoundError" in errors


def test_pruning_by_importance_keeps_small_weights_of_large_inputs() -> None:
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0, torch.nan, -torch.inf, 1.0, 0.0]])
    norms = torch.tensor([1.0, 1.0, 2.0, 10.0, 1.0, 1.0, 9.0, 9.0])
    assert prune_weight(weight, "2:4").tolist()[0][:4] == [4.0, -3.0, 0.0, 0.0]
    pruned = prune_weight(weight, "2:4", norms).tolist()[0]
    assert pruned[:4] == [4.0, 0.0, 0.0, 1.0]  # 4 and 2 · 2 are equal: the first is kept
    assert pruned[5:] == [-torch.inf, 0.0, 0.0]
    assert pruned[4] != pruned[4]  # a broken weight is not hidden


@pytest.mark.parametrize("pattern", ["2:4", "4:6", "6:8", "8:10"])
def test_pruning_keeps_the_largest_of_each_group(pattern: str) -> None:
    kind = sparsity.pattern(pattern)
    weight = torch.randn(7, 3 * kind.group + 3)
    pruned = prune_weight(weight, pattern)
    for row, kept in zip(weight, pruned, strict=True):
        for start in range(0, len(row), kind.group):
            group, left = row[start : start + kind.group], kept[start : start + kind.group]
            zeros = left == 0
            assert zeros.sum() == max(0, len(group) - kind.nonzeros)
            assert torch.equal(left[~zeros], group[~zeros])
            if zeros.any():
                assert group[zeros].abs().max() <= group[~zeros].abs().min()
    values, scale = quantize_weight(pruned, torch.int8)
    pack(values, pattern, scale, backend="reference")  # refuses a weight without the pattern


@pytest.mark.parametrize("pattern", ["2:4", "4:6", "30:32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_pruning_ranks_each_group_and_of_equal_weights_keeps_the_first(
    pattern: str, dtype: torch.dtype
) -> None:
    kind = sparsity.pattern(pattern)
    weight = torch.randint(-3, 4, (9, 3 * kind.group)).to(dtype)
    for norms in (None, torch.ones(weight.shape[1])):
        groups = weight.float().abs().view(-1, kind.group)
        rank = groups.argsort(dim=1, descending=True, stable=True).argsort(1).view(weight.shape)
        pruned = prune_weight(weight, pattern, norms)
        assert pruned.dtype == dtype
        assert torch.equal(pruned, weight.where(rank < kind.nonzeros, 0))


def test_pruning_a_weight_that_has_the_pattern_changes_nothing() -> None:
    once = prune_weight(torch.randn(5, 64).bfloat16(), "6:8")
    assert torch.equal(prune_weight(once, "6:8"), once)
    equal = torch.ones(1, 8)
    assert prune_weight(equal, "6:8").tolist() == [[1.0] * 6 + [0.0] * 2]


@pytest.mark.engine
@pytest.mark.slow
def test_the_worked_example_of_the_readme_runs_as_it_is_written(tmp_path: Path) -> None:
    """Its file and its commands, in a copy of the checkout, on vLLM's CPU engine."""
    pytest.importorskip("vllm")
    if not Path(sys.prefix, "bin", "activate").is_file():
        pytest.skip("its commands are for an environment made by uv")
    shutil.copytree(
        ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / EXAMPLE).write_text(example("python"))
    (tmp_path / ".venv").symlink_to(sys.prefix)
    models.resolve(models.TINY, "cpu", tmp_path / ".workspace" / "models")

    environment = {k: v for k, v in os.environ.items() if k not in SWITCHES}
    environment.pop("TRITON_INTERPRET", None)
    environment |= {
        "PYTHONPATH": str(tmp_path / "kernels"),  # the copy instead of the installed package
        launches.ENVIRONMENT: str(tmp_path / "log"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-ec", example("sh")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Throughput: " in done.stdout
    (counts,) = launches.read(tmp_path / "log").values()
    (layers,) = launches.read_layers(tmp_path / "log").values()
    assert sorted(layers) == sorted(
        f"model.layers.{index}.{name}"
        for index in range(2)
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    )
    (each,) = {count for launched in layers.values() for count in launched.values()}
    assert each >= 8  # a forward pass for every new token
    assert counts == {
        "int8_channel.torch": 8 * each,
        "quant_expand.reference": 8 * (each + 1),  # once while the weights were loaded
    }
