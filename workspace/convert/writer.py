# SPDX-License-Identifier: Apache-2.0
"""A safetensors file that several threads write, each tensor in pieces, in any order.

The library's `save_file` wants every tensor in memory first, and writes with one core.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from workspace.host.errors import WorkspaceError
from workspace.host.files import PARTIAL

ALIGNMENT = 8
"""Bytes: the length of a header is a multiple of it."""


class Stored(NamedTuple):
    """What the header says of a tensor."""

    dtype: str
    """In the format's words: F32, BF16, F8_E4M3, I8, ..."""
    shape: list[int]
    nbytes: int


class Writer:
    """Writes pieces of tensors to where the header says that they are."""

    def __init__(self, descriptor: int, tensors: Mapping[str, Stored]) -> None:
        """Write the header. Tensors of larger elements come first, so that each is aligned, then
        they lie in the order of their names, as the library writes them."""
        self._descriptor = descriptor
        self._starts: dict[str, int] = {}
        described: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(tensors, key=lambda name: (-_itemsize(tensors[name]), name)):
            dtype, shape, nbytes = tensors[name]
            self._starts[name], end = end, end + nbytes
            offsets = [self._starts[name], end]
            described[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        header = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % ALIGNMENT)
        self._data = ALIGNMENT + len(header)
        self._write(len(header).to_bytes(ALIGNMENT, "little") + header, 0)

    def __call__(self, name: str, offset: int, piece: torch.Tensor) -> None:
        """Write a contiguous piece of a tensor, which lies ``offset`` bytes after its start."""
        content = piece.reshape(-1).view(torch.uint8).numpy().data
        self._write(content, self._data + self._starts[name] + offset)

    def _write(self, content: bytes | memoryview, offset: int) -> None:
        while len(content):
            written = os.pwrite(self._descriptor, content, offset)
            # Linux then starts to write it to the disk, so that little is left to wait for; what is
            # there already it may forget.
            os.posix_fadvise(self._descriptor, offset, written, os.POSIX_FADV_DONTNEED)
            content, offset = content[written:], offset + written


@contextmanager
def new_file(path: Path, tensors: Mapping[str, Stored]) -> Iterator[Writer]:
    """Write beside `path`; renamed to it when the block has ended and all is on the disk.

    Raises:
        WorkspaceError: it cannot be written; nothing is left behind.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        with partial.open("wb") as file:
            yield Writer(file.fileno(), tensors)
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise WorkspaceError(
            f"cannot write {path}: {error}; free some space or make it writable, then re-run"
        ) from error


def _itemsize(tensor: Stored) -> float:
    return tensor.nbytes / max(torch.Size(tensor.shape).numel(), 1)
