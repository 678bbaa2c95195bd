# SPDX-License-Identifier: Apache-2.0
"""The L2 norm of each input feature of each linear layer, over the tokens of a text.

    norms[k] = sqrt(sum over tokens of x[token, k]²)

They weigh the columns of a weight: a weight that multiplies large activations matters more (Wanda,
arXiv 2306.11695). They are kept as safetensors, layer → [K] float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file

from workspace.convert.layers import Layers
from workspace.environment.progress import LoggedProgress
from workspace.host.errors import WorkspaceError

TOKENS = 1 << 16
"""At most so many of the text's tokens are used: norms need few."""
LENGTH = 2048
"""Tokens in a row, if the model takes as many."""


def read(path: Path, layers: Layers) -> dict[str, torch.Tensor]:
    """The norms in a file of the user's.

    Raises:
        WorkspaceError: it cannot be read, or does not fit the layers; names the first.
    """
    try:
        norms = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WorkspaceError(
            f"SCORES={path}: cannot be read ({error}); pass a safetensors file"
        ) from error
    for name, (_, k) in layers.linear.items():
        found = norms.get(name)
        if found is None or list(found.shape) != [k]:
            what = "nothing" if found is None else list(found.shape)
            raise WorkspaceError(f"SCORES={path}: {name} needs norms [{k}], and it has {what}")
        if not (found.isfinite() & (found >= 0)).all():
            raise WorkspaceError(f"SCORES={path}: {name} has norms that are negative or not finite")
    return {name: norms[name].float() for name in layers.linear}


def gather(text: Path, folder: Path, tokenizer: Path, layers: Layers) -> dict[str, torch.Tensor]:
    """The norms over the first tokens of a text, from the model itself; on the GPU if there is one.

    Raises:
        WorkspaceError: the text cannot be read, or is too short.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        content = text.read_text()
    except (OSError, UnicodeError) as error:
        raise WorkspaceError(f"CALIBRATE={text}: cannot be read as text ({error})") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenize: Any = AutoTokenizer.from_pretrained(tokenizer)
    ids: list[int] = tokenize(content)["input_ids"][:TOKENS]
    if len(ids) < 2:
        raise WorkspaceError(f"CALIBRATE={text}: it has less than two tokens; pass a longer text")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    squares = {name: torch.zeros(k, device=device) for name, (_, k) in layers.linear.items()}
    modules: Mapping[str, torch.nn.Module] = dict(model.named_modules())
    hooks = [modules[name].register_forward_pre_hook(_adds_to(squares[name])) for name in squares]
    length = min(LENGTH, getattr(model.config, "max_position_embeddings", LENGTH))
    columns = TextColumn("· {task.description}"), BarColumn(), MofNCompleteColumn()
    with LoggedProgress(*columns, TimeRemainingColumn()) as progress, torch.inference_mode():
        task = progress.add_task("gathering norms, tokens", total=len(ids))
        for first in range(0, len(ids), length):
            row = ids[first : first + length]
            model(input_ids=torch.tensor([row], device=device), use_cache=False, logits_to_keep=1)
            progress.update(task, advance=len(row))
    for hook in hooks:
        hook.remove()
    return {name: total.sqrt().cpu() for name, total in squares.items()}


def _adds_to(squares: torch.Tensor) -> Any:
    """A hook that adds the squares of a layer's input."""

    def add(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        squares.add_(arguments[0].flatten(0, -2).float().square().sum(0))

    return add
