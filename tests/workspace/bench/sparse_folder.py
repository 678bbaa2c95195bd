# SPDX-License-Identifier: Apache-2.0
"""A folder with sparse weights in 8 bits, written by its definition."""

import json
import shutil
from pathlib import Path

import torch
from custom_kernels.sparse_gemm import prune_weight, quantize_weight
from safetensors.torch import load_file, save_file

from tests.workspace.bench.samples import quantization_config

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def write(source: Path, folder: Path, precision: str) -> Path:
    """The Qwen2 in `source`, pruned to 2:4 and quantized, in `folder`."""
    shutil.copytree(source, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        tensors[name] = tensor
        if name.endswith("proj.weight"):
            values, scale = quantize_weight(prune_weight(tensor, "2:4"), DTYPES[precision])
            tensors |= {name: values, f"{name}_scale": scale.unsqueeze(1)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    entry = quantization_config(precision, source={"model": source.name})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    return folder
