# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with sparse weights in vLLM: each kind loads, computes what its tensors say on any
number of ranks, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_kernels import launches
from custom_kernels.quantization import quantize
from custom_kernels.sparse_gemm import reference

from tests.kernels import checkpoints, vllm_program
from tests.kernels.checkpoints import Tensors
from tests.language_model import LanguageModel
from workspace.bench import tiny_model
from workspace.bench.models import DUMMY_FORMAT
from workspace.host.paths import ROOT

INT8, FP8 = torch.int8, torch.float8_e4m3fn

# What vLLM does with a model's folder before the first request, without an engine around it.
PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model

folder, root, jobs = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
sys.path.insert(0, root)
# Once, not in each child.
import vllm.model_executor.models.mixtral, vllm.model_executor.models.qwen2
import workspace.bench.dummy_weights
from custom_kernels.vllm.quantization import _checkpoint
from vllm.plugins import load_general_plugins

load_general_plugins()

def built(job, rank):
    ranks = job["ranks"]
    arguments = EngineArgs(job["folder"], tokenizer=f"{folder}/source/tokenizer",
                           max_model_len=128, enforce_eager=True, **job["options"])
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        store = f"file://{folder}/{job['name']}.store"
        init_distributed_environment(ranks, rank, store, rank, "gloo")
        initialize_model_parallel(ranks, 1)
        config.parallel_config.tensor_parallel_size = ranks
        return get_model(vllm_config=config), config.quant_config

def run(job, rank):
    model, config = built(job, rank)
    said = {"config": type(config).__name__, "name": config.get_name(), "methods": {}}
    outputs = {}
    for name, layer in model.named_modules():
        if not name.endswith("_proj"):
            continue
        said["methods"][name] = type(layer.quant_method).__name__
        k = layer.input_size_per_partition
        begin = rank * k if name.endswith(("o_proj", "down_proj")) else 0
        x = torch.load(f"{folder}/x.pt")[:, begin : begin + k]
        outputs[name] = layer.quant_method.apply(layer, x.contiguous(), layer.bias)
    torch.save(outputs, f"{folder}/{job['name']}.{rank}.pt")
    return said

for job in jobs:
    children = []
    for rank in range(job["ranks"]):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            # A worker of vLLM sets it, for the shared memory of ranks on a CPU with AVX-512.
            os.environ["VLLM_DIST_IDENT"] = f"{os.getppid()}-{job['name']}"
            try:
                said = run(job, rank)
            except Exception as error:
                said = {"error": str(error)}
            with open(f"{folder}/{job['name']}.{rank}.json", "w") as file:
                json.dump(said, file)
            sys.stderr.flush()
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    for left in Path("/dev/shm").glob(f"{os.getpid()}-{job['name']}-*"):
        left.unlink()
"""


@dataclass
class Case:
    """A folder, what is asked of vLLM, and the tensors that its layers must multiply by."""

    quantization: dict[str, Any] | None
    stored: Tensors
    """The checkpoint's tensors."""
    dense: Tensors = field(default_factory=dict)
    """weight and weight_scale of every linear layer; empty where it is refused, or random."""
    ranks: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] | None = None
    """slidesparse_config.json."""
    model: dict[str, Any] = field(default_factory=dict)
    """Changes of config.json."""


def ours(dtype: torch.dtype, pattern: str, **more: Any) -> dict[str, Any]:
    made = {"quant_method": "sparse", "pattern": pattern, "source": {"model": "tiny"}}
    return checkpoints.config(dtype, **more) | made


def two_four(storage: str = "dense", structure: str = "2:4") -> dict[str, Any]:
    """compressed-tensors' sparsity_config."""
    return {
        "sparsity_config": {
            "format": storage,
            "global_sparsity": 0.5,
            "ignore": ["lm_head"],
            "registry_requires_subclass": False,
            "sparsity_structure": structure,
            "targets": ["Linear"],
        }
    }


def unquantized(tensors: Tensors) -> Tensors:
    """What a layer with bfloat16 weights multiplies by on the CPU, where the best dtype is int8."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if checkpoints.is_linear(name):
            values, scale = quantize(tensor, INT8)
            found |= {name: values, f"{name}_scale": scale.unsqueeze(1)}
    return found


def changed(tensors: Tensors, name: str, change: Callable[[torch.Tensor], Any]) -> Tensors:
    copy = tensors[name].clone()
    change(copy)
    return tensors | {name: copy}


def slidesparse(group: int, **extra: Any) -> dict[str, Any]:
    """The file that SlideSparse writes."""
    more = {"mode": "magnitude", "skip_prune": False, "skip_slide": False, "skip_compress": True}
    return {"Z": 2, "L": group, "N": group // 2, "extra": more | extra}


BITMASK = "sparse-24-bitmask"
UP = "model.layers.1.mlp.up_proj.weight"
K = "model.layers.0.self_attn.k_proj"


def cases(tensors: Tensors) -> dict[str, Case]:
    patterns = ("2:4", "4:6", "6:8", "mixed")
    sparse = {name: checkpoints.pruned(tensors, name) for name in patterns}
    int8, fp8 = (checkpoints.quantized(sparse["2:4"], dtype) for dtype in (INT8, FP8))
    tensorwise = checkpoints.quantized(sparse["2:4"], INT8, per_tensor=True)
    static = {f"{name[:-6]}input_scale": torch.ones(1) for name in int8 if name[-7:] == ".weight"}
    static = {name: scale for name, scale in static.items() if "_proj" in name}
    fp8_4_6 = checkpoints.quantized(sparse["4:6"], FP8)
    int8_6_8 = checkpoints.quantized(sparse["6:8"], INT8)
    fp8_mixed = checkpoints.quantized(sparse["mixed"], FP8)
    compressed = checkpoints.config
    bf16 = {"quant_method": "compressed-tensors"}
    dummy = {"load_format": "dummy"}
    skewed = compressed(INT8, **two_four())
    skewed["config_groups"]["group_0"]["input_activations"]["symmetric"] = False
    packed = compressed(INT8) | {"format": "marlin-24"}
    by_group = ours(INT8, "2:4")
    by_group["config_groups"]["group_0"]["weights"] |= {"strategy": "group", "group_size": 32}
    ignoring = ours(FP8, "2:4", ignore=["lm_head", "re:.*layers.1.mlp.(gate|up)_proj"])
    mixed = fp8 | {name: tensors[name] for name in (UP, UP.replace("up_proj", "gate_proj"))}
    mixed = {n: t for n, t in mixed.items() if n[:-6] not in mixed or mixed[n[:-6]].itemsize == 1}
    experts = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    experts |= {"num_local_experts": 4, "num_experts_per_tok": 2}

    def dense_row(weight: torch.Tensor) -> None:
        weight.view(torch.uint8)[5, 12:15] = 1

    return {
        "ours-int8": Case(ours(INT8, "2:4"), int8, int8),
        "ours-int8-4-ranks": Case(ours(INT8, "2:4"), int8, int8, ranks=4),
        "ours-fp8-4-6": Case(ours(FP8, "4:6"), fp8_4_6, fp8_4_6),
        "ours-fp8-2-ranks": Case(ours(FP8, "2:4"), fp8, fp8, ranks=2),
        "ours-fp8-mixed": Case(ours(FP8, "mixed"), fp8_mixed, fp8_mixed, ranks=2),
        "ours-two-layers-dense": Case(ignoring, mixed, mixed),
        "compressed-fp8": Case(
            compressed(FP8), fp8, fp8, options={"quantization": "sparse_2_4"}
        ),
        "compressed-int8-tensor-static": Case(
            compressed(INT8, per_tensor=True, static=True, **two_four()),
            tensorwise | static, tensorwise, ranks=2,
        ),
        "compressed-bf16": Case(
            bf16 | two_four(), sparse["2:4"], unquantized(sparse["2:4"])
        ),
        "bf16": Case(
            None, sparse["2:4"], unquantized(sparse["2:4"]), options={"quantization": "sparse_2_4"}
        ),
        "bitmask-bf16": Case(
            bf16 | two_four(BITMASK), checkpoints.bitmask(sparse["2:4"]), unquantized(sparse["2:4"])
        ),
        "bitmask-int8-2-ranks": Case(
            compressed(INT8, **two_four(BITMASK)), checkpoints.bitmask(int8), int8, ranks=2
        ),
        "bitmask-fp8": Case(compressed(FP8, **two_four(BITMASK)), checkpoints.bitmask(fp8), fp8),
        "slidesparse-6-8": Case(
            compressed(INT8), checkpoints.slid(int8_6_8, 8), int8_6_8, ranks=2,
            beside=slidesparse(8),
        ),
        "slidesparse-not-slid": Case(
            compressed(INT8), int8_6_8, int8_6_8, beside=slidesparse(8, skip_slide=True)
        ),
        "not-2:4": Case(compressed(INT8, **two_four(structure="unstructured")), int8),
        "dummy": Case(ours(FP8, "6:8"), {}, options=dummy),
        "scaled-dummy": Case(ours(INT8, "2:4"), {}, options={"load_format": DUMMY_FORMAT}),
        # Refused.
        "violation": Case(ours(INT8, "2:4"), changed(int8, UP, dense_row)),
        "asymmetric": Case(skewed, int8),
        "groups": Case(by_group, int8),
        "marlin": Case(packed, int8),
        "unstructured-bitmask": Case(compressed(INT8, **two_four("sparse-bitmask")), int8),
        "no-scale": Case(
            ours(INT8, "2:4"), {n: t for n, t in int8.items() if n != f"{K}.weight_scale"}
        ),
        "no-weight": Case(ours(INT8, "2:4"), {n: t for n, t in int8.items() if n != f"{K}.weight"}),
        "other-dtype": Case(ours(FP8, "2:4"), int8),
        "other-pattern": Case(ours(INT8, "2:4"), int8, options={"quantization": "sparse_4_6"}),
        "no-pattern": Case(compressed(INT8), int8, options={"quantization": "sparse"}),
        "unquantized": Case(None, sparse["2:4"], options={"quantization": "sparse"}),
        "bitmask-4-ranks": Case(
            compressed(INT8, **two_four(BITMASK)), checkpoints.bitmask(int8), ranks=4
        ),
        "bitmask-short": Case(
            compressed(INT8, **two_four(BITMASK)),
            changed(checkpoints.bitmask(int8), f"{K}.bitmask", lambda mask: mask[3].zero_()),
        ),
        "slidesparse-compressed": Case(
            compressed(INT8), int8_6_8, beside=slidesparse(8, skip_compress=False)
        ),
        "slidesparse-other-group": Case(
            compressed(INT8), checkpoints.slid(int8_6_8, 8), beside=slidesparse(6)
        ),
        "experts": Case(ours(INT8, "2:4"), {}, options=dummy, model=experts),
    }  # fmt: skip


@dataclass
class Ran:
    folder: Path
    cases: dict[str, Case]
    errors: str

    def said(self, name: str, rank: int = 0) -> dict[str, Any]:
        """What the program wrote of a case."""
        found = json.loads((self.folder / f"{name}.{rank}.json").read_text())
        assert isinstance(found, dict)
        return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """All cases, each in processes of its own, with one import of vLLM."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("checkpoints")
    model, tensors = checkpoints.source(folder / "source")
    found = cases(tensors)
    jobs = []
    for name, case in found.items():
        path = checkpoints.write(folder / name, model | case.model, case.stored, case.quantization)
        if case.beside:
            (path / "slidesparse_config.json").write_text(json.dumps(case.beside))
        jobs.append(
            {"name": name, "folder": str(path), "ranks": case.ranks, "options": case.options}
        )
    torch.save(torch.randn(7, 128).bfloat16(), folder / "x.pt")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    _, errors = vllm_program.run(
        PROGRAM, str(folder), str(ROOT), str(folder / "jobs.json"),
        HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_HOST_IP="127.0.0.1",
    )  # fmt: skip
    return Ran(folder, found, errors)


MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
KV_HEADS = tiny_model.CONFIG["num_key_value_heads"]


def shard(tensor: torch.Tensor, part: str, rank: int, ranks: int) -> torch.Tensor:
    """The rows of a weight [N, ...] that a rank has."""
    shards = min(ranks, KV_HEADS) if part in ("k_proj", "v_proj") else ranks
    return tensor.chunk(shards)[rank * shards // ranks]


def expected(
    tensors: Tensors, name: str, x: torch.Tensor, rank: int, ranks: int
) -> tuple[torch.Tensor, bool]:
    """What a rank's layer of vLLM computes, by the checkpoint's tensors alone, in float64; and
    whether it is quantized."""
    parent, _, last = name.rpartition(".")
    weights: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    biases: list[torch.Tensor] = []
    for part in MERGED.get(last, (last,)):
        layer = f"{parent}.{part}"
        weight, scale = tensors[f"{layer}.weight"], tensors.get(f"{layer}.weight_scale")
        bias = tensors.get(f"{layer}.bias", torch.zeros(len(weight)))
        if scale is not None:
            scale = scale.expand(len(weight)) if scale.dim() == 1 else scale[:, 0]
        if last in ("o_proj", "down_proj"):
            weights.append(weight.view(torch.int8).chunk(ranks, 1)[rank].view(weight.dtype))
            scales += [scale] if scale is not None else []
            biases.append(bias)
        else:
            weights.append(shard(weight, part, rank, ranks))
            scales += [shard(scale, part, rank, ranks)] if scale is not None else []
            biases.append(shard(bias, part, rank, ranks))
    weight = torch.cat([one.double() for one in weights])
    k = weight.shape[1]
    part_of_x = x[:, rank * k : (rank + 1) * k] if last in ("o_proj", "down_proj") else x[:, :k]
    bias = torch.cat(biases)
    if not scales:
        return reference.dense(part_of_x, None, weight, None, bias), False
    values, scale = quantize(part_of_x, weights[0].dtype)
    return reference.dense(values, scale, weight, torch.cat(scales).float(), bias), True


LOADED = (
    "ours-int8",
    "ours-int8-4-ranks",
    "ours-fp8-4-6",
    "ours-fp8-mixed",
    "ours-fp8-2-ranks",
    "ours-two-layers-dense",
    "compressed-fp8",
    "compressed-int8-tensor-static",
    "compressed-bf16",
    "bf16",
    "bitmask-bf16",
    "bitmask-int8-2-ranks",
    "bitmask-fp8",
    "slidesparse-6-8",
    "slidesparse-not-slid",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_a_checkpoint_computes_what_its_tensors_say_on_each_rank(ran: Ran, name: str) -> None:
    case, x = ran.cases[name], torch.load(ran.folder / "x.pt")
    for rank in range(case.ranks):
        said = ran.said(name, rank)
        outputs = torch.load(ran.folder / f"{name}.{rank}.pt")
        assert len(outputs) == 8
        for layer, found in outputs.items():
            wanted, is_quantized = expected(case.dense, layer, x, rank, case.ranks)
            torch.testing.assert_close(found.double(), wanted, atol=0.02, rtol=0.01)
            method = "StoredLinear" if is_quantized else "UnquantizedLinearMethod"
            assert said["methods"][layer] == ("SparseLinear" if name == "bf16" else method)


@pytest.mark.slow
def test_weights_that_are_said_not_to_be_2_4_are_left_to_vllm(ran: Ran) -> None:
    said = ran.said("not-2:4")
    assert said["config"] == "CompressedTensorsConfig"
    assert set(said["methods"].values()) == {"CompressedTensorsLinearMethod"}
    assert (
        "sparse: config.json has a sparsity_config (unstructured, dense), with which vLLM 0.25.1 "
        "alone refuses the model; it is loaded as dense, without this entry" in ran.errors
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("dummy", FP8), ("scaled-dummy", INT8)])
def test_a_folder_without_weights_gets_random_ones_with_the_pattern(
    ran: Ran, name: str, dtype: torch.dtype
) -> None:
    said = ran.said(name)
    assert set(said["methods"].values()) == {"SparseLinear"}
    outputs = torch.load(ran.folder / f"{name}.0.pt")
    assert all(output.std() > 0 for output in outputs.values())
    if name == "scaled-dummy":  # of which the scale is known: no layer vanishes, none explodes
        assert all(0.5 < output.std() < 2 for output in outputs.values())


REFUSED = {
    "violation": "sparse: model.layers.1.mlp.gate_up_proj (up_proj): the weight is not 2:4: row 5, "
    "group 3 (columns 12 to 15) has 3 nonzeros, 2 are allowed; name the pattern that it has, or "
    "prune it with make convert",
    "asymmetric": "sparse: model.layers.0.self_attn.qkv_proj is quantized asymmetrically; a sparse",
    "groups": "sparse: model.layers.0.self_attn.qkv_proj has weights of 8 bits by group; a sparse",
    "marlin": "sparse: the weights have format marlin-24, 4 bits in the layout of a kernel",
    "unstructured-bitmask": "sparse: the weights are compressed in the format sparse-bitmask, of",
    "no-scale": "sparse: model.layers.0.self_attn.qkv_proj has no weight_scale, or part of one",
    "no-weight": "sparse: model.layers.0.self_attn.qkv_proj (k_proj) has no weight, or not all",
    "other-dtype": "should be torch.float8_e4m3fn by config.json, and its weight in the checkpoint "
    "is torch.int8",
    "other-pattern": "sparse_4_6: the checkpoint says that its weights are 2:4, not 4:6; load",
    "no-pattern": "sparse: config.json does not say which pattern the weights have; name it, for",
    "unquantized": "--quantization sparse loads checkpoints that are sparse and quantized, and",
    "bitmask-4-ranks": "sparse: model.layers.0.mlp.down_proj has K=112, of which each rank gets 28,"
    " and a bitmask has 8 in a byte",
    "bitmask-short": "sparse: model.layers.0.self_attn.qkv_proj: the bitmask of row 131 has 0 bits "
    "for 64 values",
    "slidesparse-compressed": "sparse: slidesparse_config.json says that the weights are compressed"
    " by cuSPARSELt",
    "slidesparse-other-group": "a weight that SlideSparse slid for 4:6 has 8 bits and K=",
    "experts": "sparse: model.layers.0.block_sparse_moe.experts has experts, for which there is no",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_loaded_is_refused_by_name(ran: Ran, name: str) -> None:
    assert REFUSED[name] in ran.said(name)["error"]


@pytest.mark.slow
def test_static_scales_of_activations_are_said_once_not_to_be_used(ran: Ran) -> None:
    told = "sparse: activations are quantized per token while the model runs, and not per tensor"
    assert ran.errors.count(told) == ran.cases["compressed-int8-tensor-static"].ranks
    assert {*LOADED, *REFUSED, "not-2:4", "dummy", "scaled-dummy"} == set(ran.cases)


# Log-probabilities of the likeliest tokens, after each of a prompt and of those generated from it.
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams

folder, tokenizer, overrides, prompts = sys.argv[1:]
engine = LLM(folder, tokenizer=tokenizer, hf_overrides=json.loads(overrides), enforce_eager=True,
             max_model_len=128, max_num_seqs=4, max_num_batched_tokens=512)
greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2,
                        prompt_logprobs=2)
wanted = [{"prompt_token_ids": tokens} for tokens in json.loads(prompts)]
for found in engine.generate(wanted, greedy, use_tqdm=False):
    steps = [*found.prompt_logprobs[1:], *found.outputs[0].logprobs]
    print("steps", json.dumps([{i: entry.logprob for i, entry in step.items()} for step in steps]))
"""
LENGTH = 60
"""Tokens of a prompt."""
TIE = 0.0625
"""Distance between bfloat16 logits from 8 to 16: that far apart, kernels that round differently may
swap two tokens."""

Steps = list[dict[int, float]]


def generated(
    folder: Path, model: LanguageModel, log: Path, **overrides: Any
) -> tuple[list[Steps], dict[str, dict[str, int]]]:
    """Steps of every prompt in vLLM's engine, and what ran in every layer."""
    output, _ = vllm_program.run(
        ENGINE, str(folder), str(model.folder), json.dumps(overrides), json.dumps(prompts(model)),
        CUSTOM_KERNELS_LAUNCH_LOG=str(log), VLLM_ENABLE_V1_MULTIPROCESSING="0",
        HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_HOST_IP="127.0.0.1",
    )  # fmt: skip
    steps = [json.loads(line.removeprefix("steps ")) for line in output if line[:5] == "steps"]
    layers = next(iter(launches.read_layers(log).values()), {})
    return [[{int(i): p for i, p in step.items()} for step in one] for one in steps], layers


def prompts(model: LanguageModel) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    tokens = tokenizer.encode(model.held_out.read_text()).ids
    return [tokens[start : start + LENGTH] for start in range(0, 4 * 1000, 1000)]


def likeliest(step: dict[int, float]) -> tuple[int, float]:
    """The likeliest token, and by how much it leads."""
    (token, first), (_, second) = sorted(step.items(), key=lambda entry: -entry[1])[:2]
    return token, first - second


def assert_same_tokens(found: list[Steps], wanted: list[Steps], tie: float = TIE) -> None:
    """The same token is the likeliest after every one of the prompts, but where two are a tie."""
    after_prompts = [
        (likeliest(step), likeliest(other))
        for steps, others in zip(found, wanted, strict=True)
        for step, other in zip(steps[: LENGTH - 1], others[: LENGTH - 1], strict=True)
    ]
    same = [first[0] == second[0] for first, second in after_prompts]
    assert sum(same) >= 0.97 * len(same)
    for (token, _), (other, lead) in after_prompts:
        assert token == other or lead <= tie


def assert_same_continuations(found: list[Steps], wanted: list[Steps]) -> None:
    """Token for token, until the two likeliest are a tie."""
    compared = 0
    for steps, others in zip(found, wanted, strict=True):
        for step, other in zip(steps[LENGTH - 1 :], others[LENGTH - 1 :], strict=True):
            (token, _), (wanted_token, lead) = likeliest(step), likeliest(other)
            if token != wanted_token:
                assert lead <= TIE
                break  # from here on they continue different texts
            compared += 1
    assert compared >= 24


def sparse_folder(folder: Path, model: LanguageModel, dtype: torch.dtype) -> tuple[Path, Tensors]:
    from safetensors.torch import load_file

    sparse = checkpoints.pruned(load_file(model.folder / "model.safetensors"), "2:4")
    # Where the CPU has no instruction for it (VNNI), stock's product of int8 adds two products in
    # 16 bits that saturate; weights of half the range leave room for two.
    largest = 63 if dtype == INT8 else None
    stored = checkpoints.quantized(sparse, dtype, largest=largest)
    described = json.loads((model.folder / "config.json").read_text())
    return checkpoints.write(folder, described, stored, ours(dtype, "2:4")), stored


def assert_sparse_everywhere(layers: dict[str, dict[str, int]]) -> None:
    linear = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert sorted(layers) == sorted(f"model.layers.{i}.{name}" for i in (0, 1) for name in linear)
    (count,) = {tuple(launched.items()) for launched in layers.values()}
    assert count[0][0] == "sparse_gemm.reference"
    assert count[0][1] >= 24  # a forward pass for every token


@pytest.mark.engine
@pytest.mark.slow
def test_the_sparse_engine_generates_what_stock_vllm_does_from_the_same_tensors(
    trained_model: LanguageModel, tmp_path: Path
) -> None:
    """Int8, for which stock vLLM has a dense kernel on the CPU."""
    pytest.importorskip("vllm")
    folder, _ = sparse_folder(tmp_path / "int8", trained_model, INT8)
    found, layers = generated(folder, trained_model, tmp_path / "log")
    assert_sparse_everywhere(layers)
    dense = checkpoints.config(INT8)
    wanted, layers = generated(folder, trained_model, tmp_path / "none", quantization_config=dense)
    assert layers == {}
    assert_same_tokens(found, wanted)
    assert_same_continuations(found, wanted)


@pytest.mark.engine
@pytest.mark.slow
def test_the_sparse_engine_with_fp8_computes_what_plain_torch_does(
    trained_model: LanguageModel, tmp_path: Path
) -> None:
    """Stock vLLM has no dense fp8 kernel on the CPU."""
    pytest.importorskip("vllm")
    from transformers import AutoModelForCausalLM

    folder, stored = sparse_folder(tmp_path / "fp8", trained_model, FP8)
    found, layers = generated(folder, trained_model, tmp_path / "log")
    assert_sparse_everywhere(layers)

    model = AutoModelForCausalLM.from_pretrained(trained_model.folder, dtype=torch.bfloat16)
    for name, layer in model.named_modules():
        if f"{name}.weight_scale" in stored:
            layer.forward = partial(plain, layer, stored, name)
    tokens = torch.tensor(prompts(trained_model))
    logits = model(tokens).logits.float().log_softmax(-1).topk(2)
    wanted = [
        [
            dict(zip(ids.tolist(), values.tolist(), strict=True))
            for ids, values in zip(*both, strict=True)
        ]
        for both in zip(logits.indices, logits.values, strict=True)
    ]
    # transformers rounds elsewhere, and 8 bits of floating point keep 4 of a value's.
    assert_same_tokens(found, wanted, tie=0.25)


def plain(layer: torch.nn.Linear, stored: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    values, scale = quantize(x.flatten(0, -2), FP8)
    weight, w_scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale"][:, 0]
    y = reference.dense(values, scale, weight, w_scale.float(), layer.bias)
    return y.bfloat16().view(*x.shape[:-1], -1)
