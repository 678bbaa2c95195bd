# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for models that come without one: token i is the word "ti".

Words are separated by blanks, so that decoding any token ids and encoding the text again gives
the same ids. vLLM's random dataset makes its prompts that way; with this tokenizer a prompt of n
tokens has n tokens, exactly.

It is written to its own folder, without a config.json: for some model types transformers replaces
the tokenizer's class by one that splits words differently.
"""

import json
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"


def write(folder: Path, vocab_size: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for ids 0 … vocab_size - 1.

    The last id is the end-of-text token, which is also the one for words that are not known.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    folder.mkdir()
    words = {f"t{i}": i for i in range(vocab_size - 1)} | {END_OF_TEXT: vocab_size - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
