# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from workspace.doctor import CUDA_COMPONENT, mixed_components
from workspace.environment import lock
from workspace.host.paths import LOCKS
from workspace.pins.model import load
from workspace.pins.release import conda_file

VERSIONS = sorted(load().vllm.release)
PYTHONS = sorted(load().python.supported)
EACH_RELEASE = pytest.mark.parametrize("version", VERSIONS)


def entries(version: str) -> list[str]:
    """The lock's entries, each in one line with its hashes."""
    text = "".join(lock.lock_path(version, gpu=gpu).read_text() for gpu in (False, True))
    joined = text.replace(" \\\n    ", " ")
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


def requirements(version: str) -> list[Requirement]:
    return [Requirement(entry.split(" --hash=")[0]) for entry in entries(version)]


@EACH_RELEASE
def test_the_locks_were_made_from_the_pins_as_they_are(version: str) -> None:
    for gpu in (False, True):
        text = lock.lock_path(version, gpu=gpu).read_text()
        assert text.startswith(lock.header(load(), version)), "run: make lock"


@EACH_RELEASE
def test_conda_s_file_was_made_from_the_pins_as_they_are(version: str) -> None:
    written = conda_file(version).read_text()
    assert written == lock.environment_yml(version), "run: make lock"


def test_the_default_release_has_the_plain_names() -> None:
    names = [conda_file(version).name for version in VERSIONS]
    assert names.count("environment.yml") == 1
    assert conda_file(load().vllm.default).name == "environment.yml"


@EACH_RELEASE
def test_every_entry_is_exact_and_has_hashes(version: str) -> None:
    for entry in entries(version):
        assert re.match(r"[A-Za-z0-9._-]+==\S+", entry)
        assert "--hash=sha256:" in entry


def test_no_lock_names_an_address() -> None:
    for path in (*LOCKS.glob("*"), *map(conda_file, VERSIONS)):
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links", path.read_text())


@EACH_RELEASE
@pytest.mark.parametrize("python", PYTHONS)
def test_each_supported_python_gets_one_version_of_each_package(python: str, version: str) -> None:
    release = load().release(version)
    environment = {
        "python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux",
        "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix",
        "implementation_name": "cpython", "platform_python_implementation": "CPython",
    }  # fmt: skip
    chosen: dict[str, list[str]] = {}
    for requirement in requirements(version):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            chosen.setdefault(name, []).append(str(requirement.specifier))
    assert {name: pins for name, pins in chosen.items() if len(pins) != 1} == {}
    assert {"torch", "triton", release.cupy_package, "pytest", "pre-commit"} <= set(chosen)
    assert chosen["torch"] == [f"=={release.torch}"]


@EACH_RELEASE
def test_the_lock_holds_one_cuda_release(version: str) -> None:
    cuda = load().release(version).cuda
    versions: dict[str, str | None] = {
        canonicalize_name(r.name): next(iter(r.specifier)).version
        for r in requirements(version)
        if CUDA_COMPONENT.fullmatch(r.name) or re.fullmatch(r"cuda-(bindings|python)", r.name)
    }
    assert set(cuda.wheels) <= set(versions)
    assert mixed_components(versions, cuda.release) == {}


@EACH_RELEASE
def test_vllm_itself_comes_from_the_fork_not_from_the_lock(version: str) -> None:
    assert "vllm" not in {canonicalize_name(r.name) for r in requirements(version)}


def test_a_release_s_own_packages_come_before_those_of_all() -> None:
    pins = load()
    ours = {"typer": "0.0.1", "only-here": "2"}
    changed = pins.release().model_copy(update={"packages": ours})
    vllm = pins.vllm.model_copy(update={"release": {"1": changed}})
    lines = lock.requirements(pins.model_copy(update={"vllm": vllm}), "1")
    assert [line for line in lines if line.startswith("typer=")] == ["typer==0.0.1"]
    assert "only-here==2" in lines


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
    for version in VERSIONS:
        assert lock.digest(changed, version) != lock.digest(pins, version)
