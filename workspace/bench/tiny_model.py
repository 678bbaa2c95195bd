# SPDX-License-Identifier: Apache-2.0
"""The bundled model: a Qwen2 of half a megabyte with random weights, made here at first use.

Every linear layer has weights ~ N(0, 1/fan_in), so activations stay of order one. The output
head favours one random successor for each token:

    lm_head[successor[t]] = FAVOUR · embedding[t] / sqrt(H) + SPREAD · noise / sqrt(H)

H is the hidden size. The favoured successor leads by several nats, so that two bfloat16 kernels
that round differently still choose the same token, while the other logits carry what the layers
computed and make a wrong kernel visible.
"""

import json
from pathlib import Path
from typing import Any

from workspace.bench import synthetic_tokenizer
from workspace.host.files import new_folder

SEED = 20251
FAVOUR = 1.0
SPREAD = 1.5

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 255,
    "bos_token_id": 255,
}


def ensure(folder: Path) -> None:
    """Write the model to `folder` unless that exists."""
    if not folder.is_dir():
        with new_folder(folder) as partial:
            write(partial)


def write(folder: Path) -> None:
    """Write config.json, model.safetensors and tokenizer/; the same bytes each time."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    weights = folder / "model.safetensors"
    save_file(_weights(), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors leaves it readable for its owner only
    synthetic_tokenizer.write(folder / "tokenizer", CONFIG["vocab_size"])


def _weights() -> dict[str, Any]:
    """Name -> bfloat16 tensor, drawn by numpy, whose streams do not change between versions."""
    import numpy as np
    import torch

    rng = np.random.default_rng(SEED)

    def draw(*shape: int, scale: float = 1.0) -> Any:
        return torch.from_numpy(rng.standard_normal(shape) * scale).to(torch.bfloat16)

    def linear(out: int, width: int) -> Any:
        return draw(out, width, scale=width**-0.5)

    hidden, inner, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    head_dim = hidden // CONFIG["num_attention_heads"]
    kv = head_dim * CONFIG["num_key_value_heads"]
    embedding = draw(vocab, hidden)
    head = draw(vocab, hidden, scale=SPREAD * hidden**-0.5).float()
    successor = torch.from_numpy(rng.permutation(vocab))
    head[successor] += FAVOUR * hidden**-0.5 * embedding.float()

    weights: dict[str, Any] = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": head.to(torch.bfloat16),
    }
    for index in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name, out in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
            weights[f"{layer}.self_attn.{name}.weight"] = linear(out, hidden)
            weights[f"{layer}.self_attn.{name}.bias"] = draw(out, scale=0.1)
        weights[f"{layer}.self_attn.o_proj.weight"] = linear(hidden, hidden)
        weights[f"{layer}.mlp.gate_proj.weight"] = linear(inner, hidden)
        weights[f"{layer}.mlp.up_proj.weight"] = linear(inner, hidden)
        weights[f"{layer}.mlp.down_proj.weight"] = linear(hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return weights
