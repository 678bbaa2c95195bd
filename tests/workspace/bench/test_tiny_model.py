# SPDX-License-Identifier: Apache-2.0
"""The bundled model and its tokenizer: small, the same each time, and fit for comparing outputs."""

import random
from pathlib import Path
from typing import Any

import pytest

from workspace.bench import synthetic_tokenizer, tiny_model

VOCAB = tiny_model.CONFIG["vocab_size"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model.ensure(made)
    return made


def files(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_it_is_about_half_a_megabyte_with_its_tokenizer(folder: Path) -> None:
    assert sum(map(len, files(folder).values())) < 600_000


def test_writing_it_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    tiny_model.write(tmp_path)
    assert files(tmp_path) == files(folder)


def test_nothing_unfinished_is_left_beside_it(folder: Path) -> None:
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_any_tokens_decode_and_encode_to_themselves(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
    rng = random.Random(1)
    for length in (1, 2, 7, 300):
        ids = [rng.randrange(VOCAB - 1) for _ in range(length)]
        assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids
    assert tokenizer.vocab_size == VOCAB
    assert tokenizer.all_special_ids == [VOCAB - 1]
    assert tokenizer.num_special_tokens_to_add() == 0


def test_a_tokenizer_of_a_catalogue_size_is_made_in_seconds(tmp_path: Path) -> None:
    synthetic_tokenizer.write(tmp_path / "big", 152064)
    assert (tmp_path / "big" / "tokenizer.json").stat().st_size < 8_000_000


def test_greedy_choices_survive_bfloat16_and_logits_depend_on_the_layers(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, VOCAB - 1, (8, 48), generator=torch.Generator().manual_seed(1))
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        want, got = exact(ids).logits.log_softmax(-1), rounded(ids).logits.float().log_softmax(-1)
        exact.model.layers[1].mlp.down_proj.weight.zero_()
        broken = exact(ids).logits.log_softmax(-1)
    assert (want.argmax(-1) == got.argmax(-1)).float().mean() > 0.98
    assert (want - got).abs().max() < 0.25
    assert (want - broken).abs().mean() > 0.25
