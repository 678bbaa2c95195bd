# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from workspace.check_committable import MAX_BYTES, main, problems


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.safetensors", b"\x00\x01" * 100, "a binary"),
        ("kernel.so", b"\x7fELF\x00", "a binary"),
        ("data.txt", b"x" * (MAX_BYTES + 1), "bytes"),
        ("uv.lock", b"version = 1\n", "records addresses"),
        ("notes.md", b"see " + b"/home/" + b"somebody/file\n", "path of one machine"),
        ("locks/a.txt", b"--index-url " + b"https://example.invalid\n", "has an address"),
        ("environment.yml", b"- https" + b"://example.invalid/x.whl\n", "has an address"),
    ],
)
def test_what_does_not_belong_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    assert any(says in problem for problem in problems(path))
    assert main([name]) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chart.png", b"\x89PNG\x00\x00"),
        ("README.md", b"see https" + b"://example.invalid/docs and kernels/README.md\n"),
        ("code.py", b"path = ROOT / 'work' / 'file'\n"),
    ],
)
def test_what_belongs_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    assert list(problems(Path(name))) == []
