# SPDX-License-Identifier: Apache-2.0
"""The prompts of the output comparison: one batch that both variants continue greedily."""

from workspace.bench.plan import Plan
from workspace.bench.variants import max_model_len

NEW_TOKENS = (8, 24)
"""Fewest and most greedy tokens per prompt; OUTPUT_LEN if in between."""
TOP = 8
"""Log-probabilities compared per step."""

PROMPTS = [
    "The fastest way to multiply two matrices is",
    "A warp on a GPU has thirty-two threads because",
    "In the morning the harbour was quiet, and then",
    "def transpose(matrix):",
    "Water boils at a lower temperature on a mountain, since",
    "The three primary colours are",
    "Once the train had left the station,",
    "To sort a list in place, one can",
]
"""For models with real weights; others get fixed token ids."""
PROMPT_LENGTHS = (1, 2, 3, 5, 8, 13, 17, 32)
"""Lengths of the prompts made of token ids, deliberately uneven."""


def new_tokens(plan: Plan) -> int:
    """Greedy tokens per prompt."""
    fewest, most = NEW_TOKENS
    room = max(1, max_model_len(plan) - max(PROMPT_LENGTHS))
    return min(most, max(fewest, plan.output_len), room)


def prompts(plan: Plan, seed: int) -> list[str] | list[list[int]]:
    """Texts for a model with real weights, token ids drawn with `seed` for others."""
    if plan.model.weights == "real":
        return PROMPTS
    import numpy as np

    ids = np.random.default_rng(seed)
    longest = max(1, max_model_len(plan) - 1)
    lengths = [min(length, longest) for length in PROMPT_LENGTHS]
    return [ids.integers(0, plan.model.config.vocab_size, size=n).tolist() for n in lengths]
