# SPDX-License-Identifier: Apache-2.0
"""Which vLLM release a verb works on, and where that release's tree and environment lie.

Each release has a tree of its own, `vllm-fork/releases/<version>`, and an environment of its own,
so that both can be used at the same time. `vllm-fork/src` is a link to the tree of the active
release. Switching replaces the link, which happens at once or not at all: no file of a tree is
moved, and a run that uses the other release goes on.

Standard library only: this serves before the environment exists.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

from workspace.host import settings
from workspace.host.errors import WorkspaceError
from workspace.host.files import PARTIAL
from workspace.host.paths import FORK, HOME, MACHINE, PINS, ROOT, STATE


def pins() -> dict[str, Any]:
    """pins.toml, unchecked: `workspace.pins` checks it where there is an environment."""
    import tomllib

    try:
        return tomllib.loads(PINS.read_text())
    except FileNotFoundError:
        raise WorkspaceError(f"{PINS} is missing; run: git checkout pins.toml") from None
    except tomllib.TOMLDecodeError as error:
        raise WorkspaceError(f"{PINS} is not valid TOML: {error}") from None


def link() -> Path:
    return FORK / "src"


def tree(version: str | None = None) -> Path:
    """The tree of a release; without `version`, of the selected one."""
    return FORK / "releases" / (version or selected())


def trees() -> list[Path]:
    """The trees that there are."""
    found = (FORK / "releases").glob("*")
    return sorted(path for path in found if path.is_dir() and not path.name.startswith(PARTIAL))


def active() -> str | None:
    """The release that `vllm-fork/src` shows, None where nothing is there yet."""
    return Path(os.readlink(link())).name if link().is_symlink() else None


def selected() -> str:
    """VLLM_VERSION= if given, else the active release, else the default of pins.toml."""
    return settings.current().version or active() or str(pins()["vllm"]["default"])


def require_pinned(version: str) -> None:
    """Raise unless pins.toml has the release."""
    known = pins()["vllm"]["release"]
    if version in known:
        return
    if version == active() and settings.current().version is None:
        raise WorkspaceError(
            f"vllm-fork/src shows vLLM {version}, which pins.toml does not have; go back with "
            f"make dev VLLM_VERSION={next(iter(known))}, or carry your commits on from there"
        )
    raise WorkspaceError(
        f"vLLM {version} is not pinned; pins.toml has {', '.join(known)}. To bring your commits "
        f"to another release: make fork-rebase VERSION={version}"
    )


def activate(version: str) -> None:
    """Let `vllm-fork/src` show the tree of `version`; an older link is replaced at once.

    Raises:
        WorkspaceError: something else is at that place.
    """
    place = link()
    if active() == version:
        return
    if place.exists() and not place.is_symlink():
        raise WorkspaceError(
            f"{place} is there, but this workspace did not make it; move it away and run: make dev"
        )
    with tempfile.TemporaryDirectory(dir=FORK, prefix=PARTIAL) as work:
        fresh = Path(work) / "src"
        fresh.symlink_to(Path("releases") / version)
        fresh.replace(place)


def adopt(version: str) -> None:
    """Give a tree that lies at vllm-fork/src itself, as it did before there were several, its
    place among the releases. Killed in between, the next call makes the link."""
    place, target = link(), tree(version)
    if place.is_dir() and not place.is_symlink() and not target.exists():
        target.parent.mkdir(exist_ok=True)
        place.rename(target)
    if target.exists() and not place.exists():
        with contextlib.suppress(FileNotFoundError):
            place.unlink()  # a link that leads nowhere
        activate(version)


def _suffix(version: str) -> str:
    """What a release's own files have in their names: the default one has the plain names."""
    return "" if version == pins()["vllm"]["default"] else f"-{version}"


def environment(mode: str, version: str) -> Path:
    """The environment of a release."""
    place = {"uv": HOME / ".venv", "conda": HOME / ".conda", "system": MACHINE / "system"}[mode]
    return place.with_name(place.name + _suffix(version))


def bundled(version: str) -> Path:
    """What a bundle brought for ENV=system of a release: packages, binaries, its manifest."""
    return STATE / f"bundle{_suffix(version)}"


def conda_file(version: str) -> Path:
    """What conda makes the environment of a release from."""
    return ROOT / f"environment{_suffix(version)}.yml"
