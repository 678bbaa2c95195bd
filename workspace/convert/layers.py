# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint are weights of linear layers, by the architecture in transformers.

Every torch.nn.Linear but the output head is pruned and quantized, embeddings, norms and biases are
not. What is none of these may be a linear layer under another name (experts, GPT-2's Conv1D), which
vLLM would look for quantized weights of: it is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from workspace.host.errors import WorkspaceError


@dataclass(frozen=True)
class Layers:
    """`linear`: layer → (N, K). `head`: the output head's name."""

    linear: dict[str, tuple[int, int]]
    head: str


def find(folder: Path, group: int, tensors: set[str] | None) -> Layers:
    """The linear layers of the model in `folder`.

    Args:
        group: length of the pattern's groups.
        tensors: names of the checkpoint's matrices; None: there is no checkpoint.

    Raises:
        WorkspaceError: the architecture is unknown, or a layer cannot be converted; names it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if already := json.loads((folder / "config.json").read_text()).get("quantization_config"):
        method = already.get("quant_method", "of an unnamed method")
        raise WorkspaceError(
            f"MODEL={folder}: it is quantized already ({method}); use the original"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # which exception depends on the class
        reason = " ".join(str(error).split())[:200]
        raise WorkspaceError(
            f"MODEL={folder}: transformers cannot build its architecture, so its linear layers are "
            f"not known ({type(error).__name__}: {reason})"
        ) from error
    output = model.get_output_embeddings()
    linear: dict[str, tuple[int, int]] = {}
    known: set[str] = set()
    head = "lm_head"
    for name, module in model.named_modules():
        if module is output:
            head = name
        elif isinstance(module, torch.nn.Linear):
            linear[name] = module.out_features, module.in_features
        elif not isinstance(module, torch.nn.Embedding):
            continue
        known.add(f"{name}.weight")
    _check(folder, linear, group)
    matrices = {name for name, one in model.named_parameters() if one.dim() > 1}
    for name in [*sorted(matrices - known), *sorted((tensors or set()) - known)]:
        raise WorkspaceError(
            f"MODEL={folder}: {name.removesuffix('.weight')} is no linear layer that can be "
            "converted; experts, convolutions and additional heads are not"
        )
    for name in sorted(linear) if tensors is not None else ():
        if f"{name}.weight" not in (tensors or ()):
            raise WorkspaceError(f"MODEL={folder}: {name} has no weight in the checkpoint")
    return Layers(linear, head)


def _check(folder: Path, linear: dict[str, tuple[int, int]], group: int) -> None:
    if not linear:
        raise WorkspaceError(f"MODEL={folder}: its architecture has no linear layers to convert")
    for name, (_, k) in linear.items():
        if k < group:
            raise WorkspaceError(
                f"MODEL={folder}: {name} has K={k}, less than a group of {group}; use a pattern "
                "with smaller groups"
            )
