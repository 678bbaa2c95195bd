# SPDX-License-Identifier: Apache-2.0
"""Quantization methods inside vLLM: found, registered, right, traced as two ops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from custom_kernels import sparsity
from custom_kernels.sparse_gemm import pack, prune_weight, quantize_weight
from custom_kernels.vllm import quantization

from tests.kernels import vllm_program

PATTERNS = {"sparse_2_4": "2:4", "sparse_4_6": "4:6", "sparse_6_8": "6:8"}

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
patterns = {"sparse_2_4": "2:4", "sparse_4_6": "4:6", "sparse_6_8": "6:8"}
configs = {name: pickle.loads(pickle.dumps(get_quantization_config(name)())) for name in patterns}
print([config.get_name() for config in configs.values()])

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

method = configs["sparse_6_8"].get_quant_method(layers["sparse_6_8"], "")
try:
    method.create_weights(layers["sparse_6_8"], 36, [24], 72, 24, torch.bfloat16)
except ValueError as error:
    print(error)

import custom_kernels.vllm.quantization as folder
from pathlib import Path
folder.__file__, folder.__path__ = f"{sys.argv[3]}/__init__.py", [sys.argv[3]]
for name, text in (("fp8", ""), ("broken", "import nothing_like_this"), ("good", "from "
                   "custom_kernels.vllm.quantization.sparse_2_4 import Config")):
    Path(sys.argv[3], f"{name}.py").write_text(text)
folder.register()
print(get_quantization_config("good").__name__)
"""
)


def test_methods_are_found_by_their_files_without_importing_vllm() -> None:
    assert set(PATTERNS) <= set(quantization.names())
    assert not [name for name in quantization.names() if name.startswith("_")]


@pytest.mark.slow
def test_sparse_methods_compute_what_they_say_in_two_ops_and_count_by_layer(
    tmp_path: Path,
) -> None:
    store, log, folder = (tmp_path / name for name in ("store", "log", "folder"))
    folder.mkdir()
    lines, errors = vllm_program.run(
        PROGRAM, str(store), str(log), str(folder), CUSTOM_KERNELS_LAUNCH_LOG=str(log)
    )
    ops = ["custom_kernels.quant_expand.default", "custom_kernels.sparse_gemm.default"]
    assert lines[-7:] == [
        str(list(PATTERNS)),
        "UnquantizedEmbeddingMethod",
        *(f"{name} {ops} {{'sparse_gemm.reference': 3}}" for name in PATTERNS),
        "sparse_6_8: model.layers.2.mlp.down_proj has K=72, of which each rank gets 36, and these "
        "are no whole groups of 8; use fewer tensor-parallel ranks or another pattern",
        "Config",
    ]
    assert "quantization/fp8.py: vLLM has a method 'fp8'; rename the file" in errors
    assert "quantization/broken.py cannot be used: ModuleNotFoundError" in errors


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), "8:10"])
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


def test_pruning_a_weight_that_has_the_pattern_changes_nothing() -> None:
    once = prune_weight(torch.randn(5, 64).bfloat16(), "6:8")
    assert torch.equal(prune_weight(once, "6:8"), once)
    equal = torch.ones(1, 8)
    assert prune_weight(equal, "6:8").tolist() == [[1.0] * 6 + [0.0] * 2]
