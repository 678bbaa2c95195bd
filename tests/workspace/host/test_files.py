# SPDX-License-Identifier: Apache-2.0
"""Files and folders are whole or not there, also after a kill and on a full disk."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workspace.host.errors import WorkspaceError
from workspace.host.files import PARTIAL, new_folder, remove_partial, write_file
from workspace.host.paths import ROOT

FULL = Path("/dev/full")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    for content in (b"old", b"new and longer"):
        write_file(path, content)
        assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_killed_at_any_moment_the_file_is_old_or_new_and_never_half(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    old, new = b"a" * 4_000_000, b"b" * 4_000_000
    write_file(path, old)
    code = (
        "import sys\nfrom pathlib import Path\nfrom workspace.files import write_file\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        f"    write_file(Path(sys.argv[1]), b'b' * {len(new)})\n"
        f"    write_file(Path(sys.argv[1]), b'a' * {len(old)})\n"
    )
    rng = random.Random(1)
    for _ in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert path.read_bytes() in (old, new)
    remove_partial(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_full_disk_is_one_line_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    write_file(path, b"old")
    # The device that is always full stands in for the temporary file.
    monkeypatch.setattr(
        "tempfile.mkstemp", lambda **_: (os.open(FULL, os.O_WRONLY), str(tmp_path / "partial"))
    )
    with pytest.raises(WorkspaceError, match="No space left on device") as caught:
        write_file(path, b"new")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorkspaceError, match="cannot write"):
        write_file(tmp_path / "file" / "record.json", b"x")
    with (
        pytest.raises(WorkspaceError, match="cannot write"),
        new_folder(tmp_path / "file" / "model"),
    ):
        pass


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "model") as partial:
            (partial / "config.json").write_text("{}")
            raise ValueError("in between")

    with pytest.raises(ValueError, match="in between"):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "model") as partial:
        assert partial.name.startswith(PARTIAL)
        assert not (tmp_path / "model").exists()
        (partial / "config.json").write_text("{}")
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


def test_a_folder_that_another_run_made_meanwhile_stays(tmp_path: Path) -> None:
    with new_folder(tmp_path / "model"):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "theirs").touch()
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["theirs"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
