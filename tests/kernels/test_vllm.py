# SPDX-License-Identifier: Apache-2.0
"""How the operations enter vLLM: the plugin, and the hook that the fork calls."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_kernels import paths

from tests.kernels import vllm_program
from workspace import doctor
from workspace.bench import models, pristine
from workspace.fork import prepare
from workspace.host.paths import ROOT
from workspace.pins import release

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
gemm = registry.operation("gemm")
registry.Backend.supports_dtype = lambda *arguments: False
gemm.best = lambda *arguments: gemm.backend("other")
print(gemm_hook.choose_backend("cpu", torch.float32))
print(gemm_hook.choose_backend("cpu", torch.float32))
"""


# Before vLLM is imported, which takes its library and its path by these answers.
AVX2_ONLY = """
import torch
for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
    setattr(torch.cpu, name, lambda: False)
"""
LAYERS = (
    vllm_program.ONE_RANK
    + """
from pathlib import Path
from custom_kernels import launches
from vllm.plugins import load_general_plugins
import vllm._custom_ops

print({line.split("/")[-1] for line in open("/proc/self/maps").read().splitlines()
       if "/vllm/_C" in line}, flush=True)

def ran(call):
    before = launches.counts().get("gemm.reference", 0)
    call()
    return launches.counts().get("gemm.reference", 0) - before

def main(store):
    with set_current_vllm_config(VllmConfig()):
        one_rank(store)
        one, other = linear("model.layers.0.mlp.down_proj"), linear("model.layers.1.mlp.down_proj")
        attention = linear("model.layers.0.self_attn.o_proj")
        head = ParallelLMHead(64, 64, params_dtype=torch.bfloat16, prefix="lm_head")
    layers = (one, other, attention, head)
    for layer in layers:
        torch.nn.init.normal_(layer.weight.data, std=0.1)
    plain = [layer.weight.detach().clone() for layer in layers]
    for layer in layers:
        layer.quant_method.process_weights_after_loading(layer)
    kept = [layer.weight.numel() > 0 for layer in layers[:3]]

    x = torch.randn(4, 64, dtype=torch.bfloat16)
    calls = [lambda layer=layer: layer.quant_method.apply(layer, x) for layer in layers]
    for call, weight in zip(calls, plain):
        torch.testing.assert_close(call(), x @ weight.T, atol=0.05, rtol=0.02)
    graphs = []
    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward
    @torch.compile(backend=keep, fullgraph=True)
    def model(x):
        return attention(other(one(x)))
    compiled = ran(lambda: model(x))
    nodes = [node for node in graphs[0].graph.nodes if "custom_kernels.gemm" in str(node.target)]
    strings = {argument for node in nodes for argument in node.args if isinstance(argument, str)}
    print(kept, [ran(call) for call in calls], compiled, strings - {""}, flush=True)

for number, setting in enumerate(sys.argv[2:]):  # one import of vLLM for all
    if os.fork() == 0:
        os.environ.update(word.split("=") for word in setting.split())
        load_general_plugins()
        main(f"{sys.argv[1]}/{number}")
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"failed: {setting}")
"""
)


OPS = """
import json, os, sys
import torch
from torch.nn import Module, ModuleList
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import get_rope
from custom_kernels import launches
from custom_kernels.vllm.plugin import register

class Block(Module):
    def __init__(self, rope):
        super().__init__()
        self.norm, self.mlp = RMSNorm(64, dtype=torch.bfloat16), Module()
        self.mlp.act_fn, self.rope = SiluAndMul(), rope

    def forward(self, positions, x, residual):
        x, residual = self.norm(x, residual)
        query, key = self.rope(positions, x.clone(), x[:, :32].clone())
        return self.norm(self.mlp.act_fn(torch.cat([query, key, key], 1))) , residual

class Model(Module):
    def __init__(self):
        super().__init__()
        theta = {"rope_theta": 10000.0, "rope_type": "default"}
        rope = get_rope(32, 128, rope_parameters=theta, dtype=torch.bfloat16)
        self.layers = ModuleList([Block(rope), Block(rope)])

    def forward(self, positions, x, residual):
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        return x, residual

def main(log):
    os.environ["CUSTOM_KERNELS_LAUNCH_LOG"] = log
    os.makedirs(log)
    torch.manual_seed(0)
    inputs = torch.arange(5), *(torch.randn(5, 64).bfloat16() for _ in range(2))
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        stock = Model()(*inputs)
        try:
            register()
        except (ValueError, RuntimeError) as error:
            print(json.dumps(str(error)), flush=True)
            return
        get_rope.__globals__["_ROPE_DICT"].clear()
        model = Model()
        for module in model.modules():
            if (method := getattr(module, "quant_method", None)) is not None:
                method.process_weights_after_loading(module)
        for got, wanted in zip(model(*inputs), stock):
            torch.testing.assert_close(got, wanted, atol=0.04, rtol=0.02)
    graphs = []
    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(*inputs)
    nodes = [node for node in graphs[0].graph.nodes if "custom_kernels" in str(node.target)]
    strings = {one for node in nodes for one in node.args if isinstance(one, str)}
    (counted,) = launches.read_layers(log).values() if launches.counts() else [{}]
    print(json.dumps([counted, len(nodes), sorted(strings)]), flush=True)

for number, setting in enumerate(sys.argv[2:]):  # one import of vLLM for all
    if os.fork() == 0:
        os.environ.update(word.split("=", 1) for word in setting.split())
        main(f"{sys.argv[1]}/{number}")
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"failed: {setting}")
"""


CAPTURED = (
    vllm_program.ONE_RANK
    + """
import json
from torch.nn import Module, ModuleList
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from custom_kernels.vllm import upstream_capture

class Sparse(UnquantizedLinearMethod):
    pass

class Block(Module):
    def __init__(self):
        super().__init__()
        self.q_norm, self.act_fn, self.mlp = RMSNorm(16), SiluAndMul(), Module()
        self.norm = RMSNorm(64)
        self.mlp.gate_up, self.mlp.act_fn = linear("gate_up", 96), SiluAndMul()
        self.mlp.down, self.mlp.router = linear("down", k=48), linear("router", bias=True)
        self.mlp.router.quant_method = Sparse()

with set_current_vllm_config(VllmConfig()):
    one_rank(sys.argv[1])
    model = Module()
    model.embed, model.layers = VocabParallelEmbedding(500, 64), ModuleList([Block(), Block()])
    model.lm_head = model.embed
    print(json.dumps(upstream_capture.layers(model, 64, 16)), flush=True)
"""
)


ENGINE = """
import json, os, sys
from torch._dynamo.utils import counters
from vllm import LLM, SamplingParams, envs
from vllm.config.utils import hash_factors

def main(package, model):
    sys.path.insert(0, package)
    sizes = {"max_model_len": 128, "max_num_seqs": 2, "max_num_batched_tokens": 128}
    # One layer is traced and compiled as many are, in less time.
    one = {"load_format": "dummy", "hf_overrides": {"num_hidden_layers": 1}}
    engine = LLM(model, tokenizer=f"{model}/tokenizer", **one, **sizes)
    greedy = SamplingParams(temperature=0, max_tokens=8)
    (found,) = engine.generate({"prompt_token_ids": [3, 1, 4, 1, 5]}, greedy, use_tqdm=False)
    key = hash_factors(envs.compile_factors())
    compiled = counters["inductor"]["fxgraph_cache_miss"]
    print(json.dumps([list(found.outputs[0].token_ids), key, compiled]), flush=True)

for package in sys.argv[2:]:  # one import of vLLM for all
    if os.fork() == 0:
        main(package, sys.argv[1])
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"failed: {package}")
"""


def test_a_capture_describes_the_layers_of_a_model_and_names_the_others(tmp_path: Path) -> None:
    (line,), _ = vllm_program.run(CAPTURED, str(tmp_path / "store"))
    found, left_out = json.loads(line)
    described = {
        name: (layer["operation"], layer["rows"], layer["method"], layer["shape"])
        for layer in found
        for name in layer["names"]
    }

    def gemm(n: int, k: int) -> dict[str, object]:
        return {"N": n, "K": k, "bias": False}

    each = {
        "mlp.gate_up": ("gemm", "tokens", None, gemm(96, 64)),
        "mlp.down": ("gemm", "tokens", None, gemm(64, 48)),
        "mlp.router": ("quantized_gemm", "tokens", "Sparse", gemm(64, 64) | {"bias": True}),
        "mlp.act_fn": ("silu_and_mul", "tokens", None, {"K": 48}),
    }
    wanted: dict[str, object] = {
        f"layers.{i}.{name}": it for i in (0, 1) for name, it in each.items()
    }
    for i, residual in ((0, False), (1, True)):
        shape = {"K": 64, "residual": residual}
        wanted[f"layers.{i}.norm"] = ("rms_norm", "tokens", None, shape)
    # Padded to whole groups of 64, and tied to the embedding.
    wanted["lm_head"] = ("gemm", "outputs", None, gemm(512, 64))
    assert described == wanted
    assert left_out == {
        "RMSNorm": ["layers.0.q_norm", "layers.1.q_norm"],
        "SiluAndMul": ["layers.0.act_fn", "layers.1.act_fn"],
    }


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="custom_kernels")
    if not found:
        pytest.skip("the package custom-kernels is not installed here: run `make dev`")
    (entry,) = {entry.value for entry in found}
    assert entry == "custom_kernels.vllm.plugin:register"


@pytest.fixture
def unpatched(tmp_path: Path) -> Path:
    """The release without the fork's patches, with its binaries."""
    tree, version = release.tree(), release.selected()
    return pristine.make_tree(tree, tmp_path / "released", prepare.upstream_tag(version), "")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["this CPU", "as with AVX2 only", "in the release"])
def test_patterns_choose_the_layers_and_leave_no_name_in_the_graph(
    tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> None:
    """For two MLP layers, one of attention and the output head: which of the first three keep
    their plain weight, how often our kernel ran in each of the four, and in the compiled three.

    Stock vLLM packs a weight and drops the plain one where oneDNN has a product for bfloat16: on
    x86-64 with AVX-512, and not with AVX2 only. Where a CPU has both, both paths are run.
    """
    masked = where == "as with AVX2 only"
    if masked and not torch.cpu._is_avx512_supported():
        pytest.skip("this CPU has no AVX-512: the other run takes the path of AVX2")
    importer = vllm_program.IMPORTER
    settings: dict[str, str] = {}
    if masked:
        importer, settings = AVX2_ONLY + importer, {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    if where == "in the release":  # the same by our plugin as by the patches
        tree = request.getfixturevalue("unpatched")
        importer = f"import sys; sys.path.insert(0, {str(tree)!r})\n{importer}"
    on, names = "VLLM_USE_CUSTOM_GEMM=1", "VLLM_CUSTOM_GEMM_LAYERS"
    # Which layers are ours, how often our kernel ran in each, and in the graph of three.
    expected = {
        "": ([False, False, False], "[0, 0, 0, 0] 0"),
        f"{names}=*": ([False, False, False], "[0, 0, 0, 0] 0"),
        on: ([True, True, True], "[1, 1, 1, 1] 3"),
        f"{on} {names}=*.mlp.*,lm_head": ([True, True, False], "[1, 1, 0, 1] 2"),
        f"{on} {names}=*.1.mlp.*,*.mpl.*": ([False, True, False], "[0, 1, 0, 0] 1"),
    }
    lines, errors = vllm_program.run(
        LAYERS, str(tmp_path), *expected, importer=importer, **settings
    )
    library, *lines = [line for line in lines if not line.startswith("[Gloo]")]
    if platform.machine() == "x86_64":
        stock_keeps = masked or not torch.cpu._is_avx512_supported()
        there = {path.name for path in (release.tree() / "vllm").glob("_C*.so")}
        assert library == str({"_C_AVX2.abi3.so" if masked else doctor.cpu_library(there)})
    else:  # what stock does there is not known here; ours are told from it all the same
        stock_keeps = lines[0].startswith("[True")
    assert lines == [
        f"{[ours or stock_keeps for ours in layers]} {ran} set()"
        for layers, ran in expected.values()
    ]
    warned = "VLLM_CUSTOM_GEMM_LAYERS: '*.mpl.*' matches none of the 4 layers here, such as lm_head"
    assert errors.count("matches none") == errors.count(warned) == 1


@pytest.mark.slow
def test_layers_of_vllm_run_our_operations_and_are_counted_by_name(tmp_path: Path) -> None:
    """Two blocks with a norm that is called twice, a rotation that they share, an activation."""
    ops = "VLLM_CUSTOM_OPS=rms_norm,silu_and_mul.reference,rotary_embedding"
    names = "VLLM_CUSTOM_OPS_LAYERS"
    settings: dict[str, tuple[Any, str]] = {
        "": ([{}, 0, []], ""),
        ops: (
            [
                {
                    "layers.0.norm": {"rms_norm.reference": 4},
                    "layers.1.norm": {"rms_norm.reference": 4},
                    "layers.0.mlp.act_fn": {"silu_and_mul.reference": 2},
                    "layers.1.mlp.act_fn": {"silu_and_mul.reference": 2},
                    "layers.0.rope": {"rotary_embedding.reference": 4},
                },
                8,
                ["", "reference"],
            ],
            "",
        ),
        f"VLLM_CUSTOM_OPS=rms_norm {names}=*.1.*,*.mpl": (
            [{"layers.0.norm": {}, "layers.1.norm": {"rms_norm.reference": 4}}, 2, [""]],
            "VLLM_CUSTOM_OPS_LAYERS: '*.mpl' matches none of the 2 layers here, such as layers.0",
        ),
        "VLLM_CUSTOM_OPS=rms_norm,softmax": (
            "VLLM_CUSTOM_OPS: no layer of vLLM runs 'softmax'; there are: "
            "paged_attention, rms_norm, rotary_embedding, silu_and_mul",
            "",
        ),
    }
    lines, errors = vllm_program.run(OPS, str(tmp_path), *settings)
    found = [json.loads(line) for line in lines if line[0] in '["']
    assert found == [wanted for wanted, _ in settings.values()]
    for _, warning in settings.values():
        assert warning in errors


EXAMPLE = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.activation import GeluAndMul

with set_current_vllm_config(VllmConfig()):
    layer = GeluAndMul()
x = torch.randn(3, 16)
wanted = layer(x)
layer.quant_method.process_weights_after_loading(layer)
compiled = torch.compile(layer, backend="eager", fullgraph=True)
torch.testing.assert_close(layer(x), wanted)
torch.testing.assert_close(compiled(x), wanted)
from custom_kernels import launches
print(json.dumps(launches.counts()), flush=True)
"""


@pytest.mark.slow
def test_a_layer_of_ones_own_is_the_text_of_the_page(tmp_path: Path) -> None:
    package = tmp_path / paths.PACKAGE.name
    shutil.copytree(paths.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "docs" / "ways-in.md").read_text()
    (text,) = re.findall(r"`(kernels/\S+\.py)`:\n\n```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / text[0].removeprefix("kernels/")).write_text(text[1])
    lines, _ = vllm_program.run(EXAMPLE, str(tmp_path), VLLM_CUSTOM_OPS="gelu_and_mul")
    assert lines[-1] == json.dumps({"gelu_and_mul.torch": 2})


@pytest.mark.slow
def test_the_hook_is_one_op_and_a_wrong_backend_one_line() -> None:
    lines, errors = vllm_program.run(PROGRAM, VLLM_USE_CUSTOM_GEMM="1")
    assert lines[-4:] == [
        "traced",
        "gemm cannot use backend 'cublastl' on cpu: there is no such backend; available: reference",
        "other",
        "other",
    ]
    said = "gemm: reference does not support torch.float32, layers of that dtype run with other"
    assert errors.count(said) == 1


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_compiled_graph_is_reused_for_the_sources_that_it_was_made_for_only(
    tmp_path: Path,
) -> None:
    """The output of GEMM in dense rows, in rows with room between them, and dense again, on one
    cache. Without vLLM's own cache of traced graphs, torch's are what is left to be right."""
    dense, apart = tmp_path / "dense", tmp_path / "apart"
    for root in (dense, apart):
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(paths.PACKAGE, root / paths.PACKAGE.name, ignore=without)
    operation = apart / paths.PACKAGE.name / "gemm" / "__init__.py"
    text = operation.read_text()
    for before, after in {
        "x.new_empty((*x.shape[:-1], weight.shape[0]))": (
            "x.new_empty((*x.shape[:-1], weight.shape[0] + 8))[..., : weight.shape[0]]"
        ),
        "run(rows, weight, bias)": (
            "torch.nn.functional.pad(run(rows, weight, bias), (0, 8))[:, : weight.shape[0]]"
        ),
    }.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    operation.write_text(text)

    model = models.resolve(models.TINY, "cpu", tmp_path / "models")
    # What vLLM knows of model classes already saves it a process that imports it once more.
    known = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vllm/modelinfos"
    if known.is_dir():
        shutil.copytree(known, tmp_path / "vllm" / known.name)
    lines, _ = vllm_program.run(
        ENGINE,
        *map(str, (model.folder, dense, apart, dense)),
        VLLM_USE_CUSTOM_GEMM="1",
        VLLM_CUSTOM_OPS="rms_norm,silu_and_mul,rotary_embedding,paged_attention",
        VLLM_USE_AOT_COMPILE="0",
        VLLM_CACHE_ROOT=str(tmp_path / "vllm"),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "torch"),
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_HOST_IP="127.0.0.1",
        HF_HUB_OFFLINE="1",
    )
    first, edited, again = (json.loads(line) for line in lines if line.startswith("[["))
    assert first[0] == edited[0] == again[0]
    assert first[1] == again[1] != edited[1]  # vLLM's key for compiled graphs
    assert min(first[2], edited[2]) > 0
    assert again[2] == 0  # nothing was compiled
