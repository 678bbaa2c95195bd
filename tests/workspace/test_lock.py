# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from workspace import lock
from workspace.doctor import mixed_components
from workspace.pins import load

VERSION = load().vllm.default
PYTHONS = sorted(load().python.supported)


def entries(version: str = VERSION) -> list[str]:
    """The lock's entries, each in one line with its hashes."""
    text = "".join(lock.lock_path(version, gpu=gpu).read_text() for gpu in (False, True))
    joined = text.replace(" \\\n    ", " ")
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


def requirements() -> list[Requirement]:
    return [Requirement(entry.split(" --hash=")[0]) for entry in entries()]


def test_the_locks_were_made_from_the_pins_as_they_are() -> None:
    for gpu in (False, True):
        text = lock.lock_path(VERSION, gpu=gpu).read_text()
        assert text.startswith(lock.header(load(), VERSION)), "run: make lock"


def test_environment_yml_was_made_from_the_pins_as_they_are() -> None:
    assert lock.ENVIRONMENT_YML.read_text() == lock.environment_yml(load()), "run: make lock"


def test_every_entry_is_exact_and_has_hashes() -> None:
    for entry in entries():
        assert re.match(r"[A-Za-z0-9._-]+==\S+", entry)
        assert "--hash=sha256:" in entry


def test_no_lock_names_an_address() -> None:
    for path in (*lock.LOCKS.glob("*"), lock.ENVIRONMENT_YML):
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links", path.read_text())


@pytest.mark.parametrize("python", PYTHONS)
def test_each_supported_python_gets_one_version_of_each_package(python: str) -> None:
    environment = {
        "python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux",
        "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix",
        "implementation_name": "cpython", "platform_python_implementation": "CPython",
    }  # fmt: skip
    chosen: dict[str, list[str]] = {}
    for requirement in requirements():
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            chosen.setdefault(name, []).append(str(requirement.specifier))
    assert {name: pins for name, pins in chosen.items() if len(pins) != 1} == {}
    assert {"torch", "triton", "cupy-cuda13x", "pytest", "pre-commit"} <= set(chosen)
    assert chosen["torch"] == [f"=={load().release().torch}"]


def test_the_lock_holds_one_cuda_release() -> None:
    release = load().release().cuda.release
    versions = {
        canonicalize_name(r.name): next(iter(r.specifier)).version
        for r in requirements()
        if re.fullmatch(
            r"nvidia-cuda-[a-z-]+|nvidia-nv(vm|jitlink|tx)|cuda-(bindings|python)", r.name
        )
    }
    assert len(versions) >= 10
    assert mixed_components(dict(versions), release) == {}


def test_vllm_itself_comes_from_the_fork_not_from_the_lock() -> None:
    assert "vllm" not in {canonicalize_name(r.name) for r in requirements()}


def test_split_parts_entries_with_all_their_lines() -> None:
    text = "a==1 \\\n    --hash=sha256:1 \\\n    --hash=sha256:2\nb==2 \\\n    --hash=sha256:3\n"
    others, named = lock.split(text, ["b"])
    assert others == "a==1 \\\n    --hash=sha256:1 \\\n    --hash=sha256:2\n"
    assert named == "b==2 \\\n    --hash=sha256:3\n"


def test_a_changed_pin_changes_the_digest() -> None:
    pins = load()
    changed = pins.model_copy(
        update={"packages": pins.packages.model_copy(update={"direct": {"typer": "0.0.1"}})}
    )
    assert lock.digest(changed, VERSION) != lock.digest(pins, VERSION)
