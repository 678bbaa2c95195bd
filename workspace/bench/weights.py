# SPDX-License-Identifier: Apache-2.0
"""Whether a model folder has its weights: all of them, complete; or none at all.

Anything else is an interrupted download, which must not be measured with dummy weights.
"""

import json
import re
import zipfile
from pathlib import Path

from workspace.host.errors import WorkspaceError

FORMATS = ("safetensors", "bin", "pt")
"""File name endings in vLLM's order: it loads the first that has files."""
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt)")
"""Files of a training run in the same folder, which vLLM ignores."""
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")
_POINTER = b"version https://git-lfs"


def complete(folder: Path, model: str) -> bool:
    """Whether the folder has weights; False if it has no file of any format.

    Args:
        model: the value of MODEL, for messages.

    Raises:
        WorkspaceError: a part of the weights is missing or damaged; names the file.
    """
    files = {ending: _files(folder, ending) for ending in FORMATS}
    indices = {ending: sorted(folder.glob(f"*.{ending}.index.json")) for ending in FORMATS}
    # Hubs keep the same weights in several formats, of which one is fetched: the index of another
    # format does not mean that files are missing.
    ending = next((one for one in FORMATS if files[one]), None)
    ending = ending or next((one for one in FORMATS if indices[one]), None)
    if ending is None:
        if unfinished := next(folder.glob(".cache/huggingface/download/**/*.incomplete"), None):
            raise WorkspaceError(
                f"MODEL={model}: its download was cut off ({unfinished}); fetch it again"
            )
        return False
    wanted = files[ending] | {name for index in indices[ending] for name in _named_by(index, model)}
    wanted |= {shard for name in wanted for shard in _shards(name)}
    for name in sorted(wanted):
        if reason := damage(folder / name):
            raise WorkspaceError(
                f"MODEL={model}: {folder / name} {reason}; fetch it again, or for dummy weights "
                "pass a folder without any"
            )
    return True


def damage(path: Path) -> str | None:
    """What is wrong with a model's file, as the end of a sentence; None if nothing."""
    if path.is_symlink() and not path.exists():
        return "is a link to a missing file"
    if not path.is_file():
        return "is missing"
    try:
        with path.open("rb") as file:
            begin = file.read(len(_POINTER))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not begin:
        return "is empty"
    if begin == _POINTER:
        return "is a Git LFS pointer, not the file itself (run git lfs pull)"
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np"):
                return None
        except SafetensorError as error:
            return f"is damaged or incomplete ({error})"
    # The directory of a zip archive is at its end, so a truncated one has none. Before torch 1.6
    # the format was a pickle, which does not record its length.
    archive = path.suffix in (".bin", ".pt") and not begin.startswith(b"\x80")
    if archive and not zipfile.is_zipfile(path):
        return "is damaged or incomplete (not a torch.save archive)"
    return None


def _files(folder: Path, ending: str) -> set[str]:
    names = {path.name for path in folder.glob(f"*.{ending}")}
    return {name for name in names if not NOT_WEIGHTS.fullmatch(name)}


def _named_by(index: Path, model: str) -> set[str]:
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WorkspaceError(
            f"MODEL={model}: cannot read {index} ({error!r}); fetch it again"
        ) from error


def _shards(name: str) -> set[str]:
    """Names of all shards, from the name of one such as model-00001-of-00002.safetensors."""
    if not (match := _SHARD.fullmatch(name)):
        return set()
    stem, number, count, suffix = match.groups()
    return {f"{stem}-{i:0{len(number)}d}-of-{count}{suffix}" for i in range(1, int(count) + 1)}
