# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints with sparse weights, of every kind that is out there, from the bundled model's
weights: written with safetensors and compressed-tensors, as their own tools write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from custom_kernels.quantization import QMAX
from custom_kernels.sparse_gemm import prune_weight

from workspace.bench import tiny_model

INNER = 112
"""Inner size of the MLP: of the down projection it is K, no multiple of 128."""

Tensors = dict[str, torch.Tensor]


def source(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """config.json and the tensors of the bundled model, narrowed; the tokenizer in `folder`."""
    from safetensors.torch import load_file

    folder.mkdir()
    tiny_model.write(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = tensor[:INNER].clone()
        elif "down_proj" in name:
            tensors[name] = tensor[:, :INNER].clone()
    return tiny_model.CONFIG | {"intermediate_size": INNER}, tensors


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def pruned(tensors: Tensors, pattern: str) -> Tensors:
    """Linear layers with the zeros of a pattern, every second of them negative zeros."""
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor
        if is_linear(name):
            kept = prune_weight(tensor, pattern)
            kept[:, ::2] = torch.where(kept[:, ::2] == 0, -0.0, kept[:, ::2])
            found[name] = kept
    return found


def quantized(
    tensors: Tensors, dtype: torch.dtype, *, per_tensor: bool = False, largest: float | None = None
) -> Tensors:
    """As compressed-tensors' own compressor does: weight and weight_scale of linear layers.
    ``largest``: the quantized value of a row's largest, if not the dtype's."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    kind = "int" if dtype == torch.int8 else "float"
    description = config(dtype, per_tensor=per_tensor)["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate(description)
    compressor = BaseCompressor.get_value_from_registry(f"{kind}-quantized")
    found: Tensors = {}
    for name, tensor in tensors.items():
        if not is_linear(name):
            found[name] = tensor
            continue
        magnitudes = tensor.float().abs()
        amax = magnitudes.max().reshape(1) if per_tensor else magnitudes.amax(1, keepdim=True)
        scale = amax / (largest or QMAX[dtype])
        state = compressor.compress({"weight": tensor, "weight_scale": scale}, scheme)
        layer = name.removesuffix("weight")
        found |= {f"{layer}{key}": value for key, value in state.items() if value is not None}
    return found


def config(
    dtype: torch.dtype, *, per_tensor: bool = False, static: bool = False, **more: Any
) -> dict[str, Any]:
    """compressed-tensors' quantization_config of a W8A8 model."""
    kind = "int" if dtype == torch.int8 else "float"
    weights: dict[str, Any] = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": False}
    weights["strategy"] = "tensor" if per_tensor else "channel"
    inputs: dict[str, Any] = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": not static}
    inputs["strategy"] = "tensor" if static else "token"
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    group |= {"output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    } | more


def bitmask(tensors: Tensors) -> Tensors:
    """As compressed-tensors' sparse-24-bitmask compressor stored the linear layers, before it was
    removed: `compressed`, `bitmask` and `shape` in the place of `weight`."""
    from compressed_tensors.utils import pack_bitmasks

    found = {}
    for name, tensor in tensors.items():
        if not is_linear(name):
            found[name] = tensor
            continue
        magnitudes = tensor.float().abs().unflatten(1, (-1, 4))
        places = magnitudes.topk(2, dim=2).indices
        mask = torch.zeros_like(magnitudes, dtype=torch.bool).scatter_(2, places, True).flatten(1)
        raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        layer = name.removesuffix("weight")
        found[f"{layer}compressed"] = raw[mask].view(tensor.dtype).view(len(tensor), -1)
        found[f"{layer}bitmask"] = pack_bitmasks(mask)
        found[f"{layer}shape"] = torch.tensor(tensor.shape).reshape(-1, 1)
    return found


def slid(tensors: Tensors, group: int) -> Tensors:
    """As SlideSparse's converter writes the linear layers: every nonzero in the first window that
    has room for it, rows padded to a multiple of 32."""
    return {
        name: slide(tensor, group) if is_linear(name) else tensor
        for name, tensor in tensors.items()
    }


def slide(weight: torch.Tensor, group: int) -> torch.Tensor:
    k = weight.shape[1]
    groups, windows = -(-k // group), group // 2 - 1
    values = torch.nn.functional.pad(weight.float(), (0, groups * group - k))
    out = torch.zeros(len(weight), groups * windows * 4)
    left = values.unflatten(1, (groups, group)).clone()
    places = out.view(len(weight), groups, windows, 4)
    for window in range(windows):
        room = torch.full((len(weight), groups), 2)
        for lane in range(4):
            value = left[:, :, 2 * window + lane]
            take = (value != 0) & (room > 0)
            places[:, :, window, lane] = torch.where(take, value, 0)
            left[:, :, 2 * window + lane] = torch.where(take, 0, value)
            room -= take.int()
    assert not left.any()
    return torch.nn.functional.pad(out, (0, -out.shape[1] % 32)).to(weight.dtype)


def write(
    folder: Path, model: dict[str, Any], tensors: Tensors, quantization: dict[str, Any] | None
) -> Path:
    """A model's folder, without a tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    described = model if quantization is None else model | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(described))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
