# SPDX-License-Identifier: Apache-2.0
"""The load format for dummy weights, on layers as vLLM makes them."""

from pathlib import Path

from tests.kernels import vllm_program

PROGRAM = (
    vllm_program.ONE_RANK
    + """
from types import SimpleNamespace
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.quantization.online.fp8 import Fp8PerTensorOnlineLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import finalize_layerwise_processing
from workspace.bench import dummy_weights
from workspace.bench.models import DUMMY_FORMAT

waiting = []

class Online(Fp8PerTensorOnlineLinearMethod):
    # vLLM's own, but for the cast: its operator for that is not there without a GPU.
    def process_weights_after_loading(self, layer):
        waiting.append(sum(p.is_meta for p in model.parameters()))
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), False)

def build(method):
    config = SimpleNamespace(
        online_quantization_config=None, get_quant_method=lambda layer, prefix: method()
    )
    made = torch.nn.ModuleDict({
        name: linear(f"layers.{name}", quant_config=config, bias=True) for name in ("down", "up")
    })
    made["lm_head"] = ParallelLMHead(64, 64, params_dtype=torch.bfloat16)
    made["embed_tokens"] = ParallelLMHead(64, 64, params_dtype=torch.bfloat16)
    made["embed_tokens"].weight = made["lm_head"].weight  # tied
    return made

loader = get_model_loader(LoadConfig(load_format=DUMMY_FORMAT))
vllm_config = VllmConfig()
vllm_config.model_config = SimpleNamespace(dtype=torch.bfloat16, is_moe=False)
with set_current_vllm_config(vllm_config):
    one_rank(sys.argv[1])
    plain, model = build(UnquantizedLinearMethod), build(Online)
loader.load_weights(plain, None)
print([name for name, weight in model.named_parameters() if weight.is_meta])
loader.load_weights(model, None)
finalize_layerwise_processing(model, None)
print(waiting)

from custom_kernels.sparse_gemm import prune_weight, quantize_weight
stored = torch.nn.ModuleDict()
for kind in (torch.int8, torch.float8_e4m3fn):
    stored["down"] = torch.nn.Module()
    for name, tensor in (("weight", torch.zeros(64, 64, dtype=kind)),
                         ("weight_scale", torch.zeros(64, 1)), ("bias", torch.zeros(64))):
        stored["down"].register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    for pattern in ("2:4", None):
        options = {"pattern": pattern} if pattern else {}
        config = LoadConfig(load_format=DUMMY_FORMAT, model_loader_extra_config=options)
        get_model_loader(config).load_weights(stored, vllm_config.model_config)
        drawn = plain["down"].weight
        values, scale = quantize_weight(prune_weight(drawn, pattern) if pattern else drawn, kind)
        assert torch.equal(stored["down"].weight.float(), values.float())
        assert torch.equal(stored["down"].weight_scale[:, 0], scale)
        assert stored["down"].bias.std() > 0
wanted = dict(plain.named_parameters())
for name, weight in model.named_parameters():
    assert torch.equal(weight, wanted[name].to(weight.dtype)), name
    print(name, weight.dtype, f"{weight.float().std():.1f}")
"""
)


def test_quantized_layers_get_the_same_weights(tmp_path: Path) -> None:
    lines, _ = vllm_program.run(PROGRAM, str(tmp_path / "store"))
    assert lines == [
        "['down.weight', 'up.weight']",
        "[1, 0]",  # one layer at a time has its weights in memory
        "down.weight torch.float8_e4m3fn 0.1",
        "down.bias torch.bfloat16 0.1",
        "up.weight torch.float8_e4m3fn 0.1",
        "up.bias torch.bfloat16 0.1",
        "lm_head.weight torch.bfloat16 0.4",
    ]
