# SPDX-License-Identifier: Apache-2.0
"""Safetensors files written in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workspace.convert.writer import Stored, new_file
from workspace.host.errors import WorkspaceError

TENSORS = {
    "z": ("BF16", torch.randn(3, 5).bfloat16()),
    "größe": ("F32", torch.randn(2)),
    "a.weight": ("F8_E4M3", torch.randn(7, 3).to(torch.float8_e4m3fn)),
    "a.weight_scale": ("F32", torch.randn(7, 1)),
    "b": ("I8", torch.arange(9, dtype=torch.int8)),
    "empty": ("I8", torch.empty(0, 4, dtype=torch.int8)),
    "one": ("I64", torch.tensor(5)),
}


def test_pieces_in_any_order_are_the_file_that_the_library_writes(tmp_path: Path) -> None:
    stored = {
        name: Stored(dtype, list(tensor.shape), tensor.nbytes)
        for name, (dtype, tensor) in TENSORS.items()
    }
    with new_file(tmp_path / "ours", stored) as write:
        for name, (_, tensor) in reversed(TENSORS.items()):
            flat = tensor.reshape(-1)
            for start in reversed(range(0, len(flat), 4)):
                write(name, start * tensor.itemsize, flat[start : start + 4])
    save_file({n: t for n, (_, t) in TENSORS.items()}, tmp_path / "library", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


def test_what_is_not_finished_leaves_no_file(tmp_path: Path) -> None:
    stored = {"a": Stored("F32", [2], 8)}
    with pytest.raises(WorkspaceError, match="damaged"), new_file(tmp_path / "new", stored):
        raise WorkspaceError("damaged")
    with pytest.raises(WorkspaceError, match="cannot write"), new_file(tmp_path / "no/new", stored):
        pass
    assert list(tmp_path.iterdir()) == []
