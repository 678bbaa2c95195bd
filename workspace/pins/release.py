# SPDX-License-Identifier: Apache-2.0
"""Which vLLM release a verb works on, and where the tree and environment of a release are.

Each release has its own tree, `vllm-fork/releases/<version>`, and its own environment, so that two
can be used at the same time. `vllm-fork/src` is a link to the tree of the active release. Switching
replaces the link atomically: no file of a tree is moved, and a run with the other release goes on.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TypedDict, cast

from workspace.host import settings
from workspace.host.errors import WorkspaceError
from workspace.host.files import PARTIAL
from workspace.host.paths import FORK, HOME, MACHINE, PINS, ROOT, STATE


class _Container(TypedDict):
    base: str
    micromamba: str


class _Uv(TypedDict):
    version: str
    sha256: dict[str, str]


class _Cuda(TypedDict):
    toolkit: str
    conda: dict[str, str]


class _Release(TypedDict):
    torch: str
    triton: str
    cupy: str
    cuda: _Cuda


class _Vllm(TypedDict):
    default: str
    release: dict[str, _Release]


class UncheckedPins(TypedDict):
    """What is read of pins.toml before there is an environment; `pins.model` checks all of it."""

    conda: dict[str, str]
    container: _Container
    uv: _Uv
    vllm: _Vllm


def parse(path: Path) -> dict[str, object]:
    """The content of a pins file.

    Raises:
        WorkspaceError: it is missing or not valid TOML.
    """
    import tomllib  # not in Python 3.10, with which bootstrap may start

    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise WorkspaceError(f"{path} is missing; run: git checkout pins.toml") from None
    except tomllib.TOMLDecodeError as error:
        raise WorkspaceError(f"{path} is not valid TOML: {error}") from None


def pins() -> UncheckedPins:
    return cast("UncheckedPins", parse(PINS))


def link() -> Path:
    return FORK / "src"


def tree(version: str | None = None) -> Path:
    """The tree of a release; without `version`, of the selected one."""
    return FORK / "releases" / (version or selected())


def trees() -> list[Path]:
    """All existing trees."""
    folders = (FORK / "releases").glob("*")
    return sorted(path for path in folders if path.is_dir() and not path.name.startswith(PARTIAL))


def active() -> str | None:
    """The release that `vllm-fork/src` points at, None without that link."""
    return Path(os.readlink(link())).name if link().is_symlink() else None


def selected() -> str:
    """VLLM_VERSION= if given, else the active release, else the default of pins.toml."""
    return settings.current().version or active() or pins()["vllm"]["default"]


def to_repeat() -> str | None:
    """VLLM_VERSION= of a command that repeats something: the selected release, None if it is the
    default."""
    version = selected()
    return version if version != pins()["vllm"]["default"] else None


def require_pinned(version: str) -> None:
    """Raise unless pins.toml has the release."""
    known = pins()["vllm"]["release"]
    if version not in known:
        raise WorkspaceError(
            f"vLLM {version} is not pinned; pins.toml has {', '.join(known)}. Select one with "
            f"VLLM_VERSION=, or rebase your commits: make fork-rebase VERSION={version}"
        )


def activate(version: str) -> None:
    """Point `vllm-fork/src` at the tree of `version`, atomically.

    Raises:
        WorkspaceError: `vllm-fork/src` is not a link.
    """
    if active() == version:
        return
    if link().exists() and not link().is_symlink():
        raise foreign(link())
    with tempfile.TemporaryDirectory(dir=FORK, prefix=PARTIAL) as work:
        new = Path(work) / "src"
        new.symlink_to(Path("releases") / version)
        new.replace(link())


def foreign(path: Path, verb: str = "make dev") -> WorkspaceError:
    """The error for a folder that only the workspace may create, but did not."""
    return WorkspaceError(
        f"{path} exists, but this workspace did not make it; move it away and run: {verb}"
    )


def _suffix(version: str) -> str:
    """The part of a file name that tells releases apart: none for the default release."""
    return "" if version == pins()["vllm"]["default"] else f"-{version}"


def environment(mode: str, version: str) -> Path:
    """The environment of a release."""
    plain = {"uv": HOME / ".venv", "conda": HOME / ".conda", "system": MACHINE / "system"}[mode]
    return plain.with_name(plain.name + _suffix(version))


def bundled(version: str) -> Path:
    """The bundle that ENV=system of a release uses: packages, binaries, its manifest."""
    return STATE / f"bundle{_suffix(version)}"


def conda_file(version: str) -> Path:
    """The file from which conda makes the environment of a release."""
    return ROOT / f"environment{_suffix(version)}.yml"
