# SPDX-License-Identifier: Apache-2.0
"""A small language model that was really trained, so that pruning it costs something.

A Qwen2 with a byte-level BPE tokenizer, trained on the English of Python's own manual, which every
CPython carries (`pydoc_data.topics`); every tenth topic is held out. K is 192 for q, k, v, o, gate
and up and 384 for down: both are multiples of 64 and of 24, so of the groups of 2:4, 4:6 and 6:8,
also on each of two ranks; 192 is not one of 128.

On the held-out text its perplexity is about 13; with the linear layers pruned to 2:4 by magnitude
it is a fifth to a third higher.

`python -m tests.language_model FOLDER` trains it: less than 60 s of processor time, and each time
the same bits on the same machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from workspace.host.files import new_folder
from workspace.host.paths import ROOT, STATE

CONFIG: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
END_OF_TEXT = "<|endoftext|>"
SEED = 14
STEPS, SEQUENCES, LENGTH = 250, 16, 64
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class LanguageModel:
    root: Path

    @property
    def folder(self) -> Path:
        """A complete Hugging Face folder: configuration, bfloat16 safetensors, tokenizer."""
        return self.root / "trained-qwen2"

    @property
    def training(self) -> Path:
        """The text that it was trained on."""
        return self.root / "training.txt"

    @property
    def held_out(self) -> Path:
        """A text that it has not seen."""
        return self.root / "held-out.txt"


def trained() -> LanguageModel:
    """The model of this recipe, trained once in a checkout, by whichever process comes first."""
    versions = [metadata.version(name) for name in ("torch", "transformers", "tokenizers")]
    recipe = [Path(__file__).read_text(), *_texts(), *versions]
    root = STATE / "models" / f"trained-{hashlib.sha256(''.join(recipe).encode()).hexdigest()[:12]}"
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        with root.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not root.is_dir():
                with new_folder(root) as partial:
                    # Its own process: the seed and the number of threads are a process's.
                    command = [sys.executable, "-m", __name__, str(partial)]
                    subprocess.run(command, cwd=ROOT, check=True)
    return LanguageModel(root)


def perplexity(network: Any, model: LanguageModel, tokens: int = 8192) -> float:
    """exp of the mean negative log-likelihood of a token of the held-out text.

    Args:
        network: a transformers model, on the CPU.
        tokens: how many of the text's first tokens count, in rows of 128.
    """
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode(model.held_out.read_text()).ids[:tokens])
    with torch.no_grad():
        rows = ids.view(-1, 128)
        return network(input_ids=rows, labels=rows).loss.exp().item()


def _texts() -> tuple[str, str]:
    """What is trained on, and what is held out."""
    names = sorted(topics)
    held_out = names[5::10]
    rest = (topics[name] for name in names if name not in held_out)
    return "\n".join(rest), "\n".join(topics[name] for name in held_out)


def _train(model: LanguageModel) -> None:
    model.folder.mkdir(parents=True)
    text, held_out = _texts()
    model.training.write_text(text)
    model.held_out.write_text(held_out)
    _train_network(model.folder, _train_tokenizer(model.folder, text))


def _train_tokenizer(folder: Path, text: str) -> list[int]:
    """Writes the tokenizer; returns the text's tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer.encode(text).ids


def _train_network(folder: Path, text: list[int]) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(1)  # as many sums in the same order on any number of cores
    torch.manual_seed(SEED)
    network = Qwen2ForCausalLM(Qwen2Config(**CONFIG))
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            # With the usual 0.02 the layers stay unused for longer than this training takes.
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    weights = list(network.parameters())
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1)
    tokens = torch.tensor(text)
    for _ in range(STEPS):
        starts = torch.randint(len(tokens) - LENGTH, (SEQUENCES, 1))
        batch = tokens[starts + torch.arange(LENGTH)]
        optimizer.zero_grad()
        network(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    network.bfloat16().save_pretrained(folder)


if __name__ == "__main__":
    _train(LanguageModel(Path(sys.argv[1])))
