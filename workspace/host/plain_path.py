# SPDX-License-Identifier: Apache-2.0
"""A second name for a folder whose own has spaces, quotes or brackets.

Tools that we start put paths into command lines and lists without quoting them: torch's inductor
(`-L`, its sources, its temporary files), `LD_PRELOAD`, which vLLM sets, nvcc, FlashInfer's ninja
files. They are given a link with a plain name, in the workspace's cache folder, or in /tmp where
that has such a name itself.

Standard library only: this serves before the environment exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from pathlib import Path

from workspace.host.errors import WorkspaceError
from workspace.host.paths import cache_root

PLAIN = re.compile(r"[\w./+@-]*")
"""Characters that need no quotes anywhere. Letters of every alphabet are among them."""
FOLDERS = (
    "HOME", "TMPDIR", "XDG_CACHE_HOME", "CUDA_HOME", "CUDA_PATH", "CUPY_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT",
)  # fmt: skip
"""Variables that name folders whose names end up in such command lines."""


def require_usable(folder: Path) -> None:
    """Raise where the path of a checkout has what PATH and git's lists cannot hold, what nvcc's
    shell or setuptools would replace, or what is no text."""
    if found := re.search(r'[:${}`"\\\x00-\x1f\x7f\ud800-\udfff]', str(folder)):
        shown = str(folder).encode(errors="backslashreplace").decode()
        raise WorkspaceError(
            f"{shown!r} has {found[0]!a} in its path, which PATH or the tools that are called "
            "cannot take; move the checkout to another folder"
        )


def plain(folder: Path) -> Path:
    """`folder` itself where its path is plain, else a link to it that is.

    Raises:
        WorkspaceError: no place for the link belongs to this user alone.
    """
    if PLAIN.fullmatch(str(folder)):
        return folder
    name = f"vllm-kernels-links-{os.geteuid()}"
    for base in (cache_root().absolute(), Path("/tmp")):
        links = base / name
        if not PLAIN.fullmatch(str(links)) or not _ours(links):
            continue
        link = links / hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
        if not link.is_symlink():
            for old in links.iterdir():
                if not old.exists():  # of a checkout that was removed
                    old.unlink(missing_ok=True)
            with contextlib.suppress(FileExistsError):  # another make was faster
                link.symlink_to(folder)
        return link
    raise WorkspaceError(
        f"{folder} has spaces or quotes in its path, for which compilers need a link with a plain "
        f"name, and /tmp/{name} is another user's; set WORKSPACE_CACHE to a folder "
        "of yours with a plain name"
    )


def _ours(folder: Path) -> bool:
    """Whether the folder, made if need be, is one in which nobody else can put a link."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    private = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(found.st_mode) and private


def variables() -> dict[str, str]:
    """Those of `FOLDERS` that have to be replaced for the tools' sake, with plain paths."""
    given = {name: Path(os.environ[name]) for name in FOLDERS if os.environ.get(name)}
    return {
        name: str(plain(folder))
        for name, folder in given.items()
        if folder.is_absolute() and folder.is_dir()
    }
