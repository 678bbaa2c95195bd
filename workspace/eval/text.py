# SPDX-License-Identifier: Apache-2.0
"""The text whose perplexity is computed, as windows of tokens.

Windows follow one another without overlap, as in the tables of GPTQ, SparseGPT and Wanda. Where a
tokenizer begins a text with a token of its own, each window begins with it; else the first token of
a window is not scored.
"""

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workspace.bench.models import Model
from workspace.host.errors import WorkspaceError

FEWEST_TOKENS = 512
"""Fewer say nothing about a model."""
LONGEST_TOKEN = 64
"""Characters of a text that are read per token: more than a token has on average anywhere."""


@dataclass(frozen=True)
class Text:
    """A text under a name that may be published."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def read(path: str | None) -> Text:
    """The text in a file; without one, Python's own manual, which every machine has.

    Raises:
        WorkspaceError: the file cannot be read.
    """
    if path is None:
        from pydoc_data.topics import topics

        pages = "\n\n".join(topics[name] for name in sorted(topics))
        return Text(f"the manual of Python {platform.python_version()}", pages)
    file = Path(path).expanduser()
    try:
        return Text(file.name, file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise WorkspaceError(
            f"TEXT={path}: it is not text in UTF-8 (byte {error.start}); pass a plain text file"
        ) from error
    except OSError as error:
        raise WorkspaceError(
            f"TEXT={path}: cannot be read ({error.strerror}); pass a plain text file"
        ) from error


def tokens(text: Text, model: Model, most: int) -> tuple[list[int], list[int]]:
    """The first tokens of a text, at most so many, and what the tokenizer begins a text with.

    Raises:
        WorkspaceError: the tokenizer cannot be loaded, or the text is too short.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model.tokenizer, trust_remote_code=False)
    except Exception as error:  # which exception a damaged file raises depends on the class
        raise WorkspaceError(
            f"MODEL={model.name}: its tokenizer cannot be loaded "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from error
    part = text.content[: most * LONGEST_TOKEN]
    ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"][:most]
    if len(ids) < FEWEST_TOKENS:
        raise WorkspaceError(
            f"TEXT={text.name}: it has {len(ids)} tokens, of which at least {FEWEST_TOKENS} are "
            "needed; pass a longer one"
        )
    begin = tokenizer("x")["input_ids"][:1]
    return ids, begin if begin == [tokenizer.bos_token_id] else []


def windows(ids: list[int], begin: list[int], length: int) -> list[list[int]]:
    """Windows of at most `length` tokens; a last one with nothing to score is left out."""
    step = length - len(begin)
    cut = [[*begin, *ids[start : start + step]] for start in range(0, len(ids), step)]
    return [window for window in cut if len(window) > 1]
