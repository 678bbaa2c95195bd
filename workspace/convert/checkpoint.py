# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in safetensors: which file has which tensor, and what else is in the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from workspace.host.errors import WorkspaceError

INDEX = "model.safetensors.index.json"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
"""Endings of files with weights, of which only safetensors are read; others are not copied."""


@dataclass(frozen=True)
class Shard:
    """A file of the checkpoint."""

    path: Path
    sizes: dict[str, int]
    """Tensor → bytes, in the order in which they lie there."""
    matrices: set[str]
    """Tensors of more than one dimension."""


def shards(folder: Path) -> list[Shard]:
    """The checkpoint's files: those that its index names, without an index all.

    Raises:
        WorkspaceError: there are none, a tensor is in two of them, or one cannot be read.
    """
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        paths = [folder / name for name in names]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise WorkspaceError(f"MODEL={folder}: its weights are not in safetensors, the only format")
    found: dict[str, Path] = {}
    read = []
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
        except (OSError, SafetensorError) as error:
            raise WorkspaceError(
                f"{path}: cannot be read as safetensors ({error}); replace it by a complete one"
            ) from error
        for name in tensors:
            if name in found:
                raise WorkspaceError(
                    f"{name} is in {found[name].name} and in {path.name} of {folder}; remove the "
                    "file that does not belong to the checkpoint"
                )
            found[name] = path
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}  # nothing is read yet
        read.append(Shard(path, sizes, {name for name, one in tensors.items() if one.dim() > 1}))
    return read


def others(folder: Path) -> Iterator[Path]:
    """Relative paths of what is no weight and not hidden: tokenizer, generation_config, README."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        weights = path.suffix in WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not hidden and not weights:
            yield relative
