# SPDX-License-Identifier: Apache-2.0
"""The model that tests prune and quantize is one that pruning hurts."""

from __future__ import annotations

import torch
from custom_kernels.sparse_gemm import prune_weight
from transformers import AutoModelForCausalLM

from tests.language_model import CONFIG, LanguageModel, perplexity


def test_sparser_patterns_cost_the_trained_model_more(trained_model: LanguageModel) -> None:
    network = AutoModelForCausalLM.from_pretrained(trained_model.folder, dtype=torch.float32)
    linear = [
        layer
        for name, layer in network.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    ]
    costs = [perplexity(network, trained_model)]
    for pattern in ("6:8", "4:6", "2:4"):  # each keeps a part of what the one before kept
        for layer in linear:
            layer.weight.data = prune_weight(layer.weight.data, pattern)
        costs.append(perplexity(network, trained_model))
    assert costs == sorted(costs)
    assert costs[0] < CONFIG["vocab_size"] / 10  # it has learned
    assert costs[-1] > 1.1 * costs[0]
