# SPDX-License-Identifier: Apache-2.0
"""Whether a model folder holds its weights: all of them, whole; or none at all.

In between lies a download that was cut off, and a folder that must not be measured with weights
that somebody made up.
"""

import json
import re
import zipfile
from pathlib import Path

from workspace.host.errors import WorkspaceError

FORMATS = ("safetensors", "bin", "pt")
"""File name endings in vLLM's order: the first of which there are files is the one it loads."""
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt)")
"""What training leaves in the same folder, and vLLM leaves aside."""
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")
_POINTER = b"version https://git-lfs"


def there(folder: Path, asked: str) -> bool:
    """Whether the folder holds weights; False where there is nothing of any.

    Args:
        asked: the MODEL that the folder is for.

    Raises:
        WorkspaceError: a part of the weights is missing or damaged; names the file.
    """
    files = {ending: _files(folder, ending) for ending in FORMATS}
    indices = {ending: sorted(folder.glob(f"*.{ending}.index.json")) for ending in FORMATS}
    # Hubs keep the same weights in several formats, of which one is fetched: beside files, the
    # index of another format is no sign of missing ones.
    ending = next((one for one in FORMATS if files[one]), None)
    ending = ending or next((one for one in FORMATS if indices[one]), None)
    if ending is None:
        if unfinished := next(folder.glob(".cache/huggingface/download/**/*.incomplete"), None):
            raise WorkspaceError(
                f"MODEL={asked}: its download was cut off ({unfinished}); fetch it again"
            )
        return False
    wanted = files[ending] | {name for index in indices[ending] for name in _named_by(index, asked)}
    wanted |= {shard for name in wanted for shard in _shards(name)}
    for name in sorted(wanted):
        if reason := damage(folder / name):
            raise WorkspaceError(
                f"MODEL={asked}: {folder / name} {reason}; fetch it again, or for dummy weights "
                "pass a folder without any"
            )
    return True


def damage(path: Path) -> str | None:
    """What is wrong with a file of a model, in words that follow its name; None for nothing."""
    if path.is_symlink() and not path.exists():
        return "is a link to a file that is not there"
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
        return "is a pointer of Git LFS, and not the file itself (git lfs pull brings it)"
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np"):
                return None
        except SafetensorError as error:
            return f"is damaged or not complete ({error})"
    # The directory of a zip archive is at its end, so one that was cut off has none. Before
    # torch 1.6 the format was a pickle, which says nothing about its length.
    archive = path.suffix in (".bin", ".pt") and not begin.startswith(b"\x80")
    if archive and not zipfile.is_zipfile(path):
        return "is damaged or not complete (not what torch.save writes)"
    return None


def _files(folder: Path, ending: str) -> set[str]:
    names = {path.name for path in folder.glob(f"*.{ending}")}
    return {name for name in names if not NOT_WEIGHTS.fullmatch(name)}


def _named_by(index: Path, asked: str) -> set[str]:
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WorkspaceError(
            f"MODEL={asked}: cannot read {index} ({error!r}); fetch it again"
        ) from error


def _shards(name: str) -> set[str]:
    """All shards, from the name of one: model-00001-of-00002.safetensors has one more."""
    if not (match := _SHARD.fullmatch(name)):
        return set()
    stem, number, count, suffix = match.groups()
    return {f"{stem}-{i:0{len(number)}d}-of-{count}{suffix}" for i in range(1, int(count) + 1)}
