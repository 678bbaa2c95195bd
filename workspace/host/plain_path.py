# SPDX-License-Identifier: Apache-2.0
"""A second name for a folder whose path has spaces, quotes or brackets.

Tools that we start put paths into command lines and lists without quoting them: torch's inductor
(`-L`, its sources, its temporary files), `LD_PRELOAD`, which vLLM sets, nvcc, FlashInfer's ninja
files. They are given a link with a plain name, in the cache folder of the workspace, or in /tmp
where the path of the cache folder is not plain either.
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
"""Characters that need no quotes anywhere, including the letters of every alphabet."""
FOLDERS = (
    "HOME", "TMPDIR", "XDG_CACHE_HOME", "CUDA_HOME", "CUDA_PATH", "CUPY_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT",
)  # fmt: skip
"""Variables that name folders whose paths end up in such command lines."""


def require_usable(folder: Path) -> None:
    """Raise when the path of a checkout has characters that PATH and git's lists cannot hold, that
    nvcc's shell or setuptools would replace, or that are not text."""
    if found := re.search(r'[:${}`"\\\x00-\x1f\x7f\ud800-\udfff]', str(folder)):
        printable = str(folder).encode(errors="backslashreplace").decode()
        raise WorkspaceError(
            f"{printable!r} has {found[0]!a} in its path, which PATH or the build tools cannot "
            "handle; move the checkout to another folder"
        )


def plain(folder: Path) -> Path:
    """`folder` itself if its path is plain, else a link to it with a plain path.

    Raises:
        WorkspaceError: no folder for the link is private to this user.
    """
    if PLAIN.fullmatch(str(folder)):
        return folder
    name = f"vllm-kernels-links-{os.geteuid()}"
    for base in (cache_root().absolute(), Path("/tmp")):
        links = base / name
        if not PLAIN.fullmatch(str(links)) or not _private(links):
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
        f"{folder} has spaces or quotes in its path, so compilers need a link with a plain name, "
        f"but /tmp/{name} belongs to another user; set WORKSPACE_CACHE to a folder of yours with a "
        "plain name"
    )


def _private(folder: Path) -> bool:
    """Create the folder if needed; whether only this user can write to it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    private = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(found.st_mode) and private


def variables() -> dict[str, str]:
    """Those of `FOLDERS` that are set, with plain paths."""
    given = {name: Path(os.environ[name]) for name in FOLDERS if os.environ.get(name)}
    return {
        name: str(plain(folder))
        for name, folder in given.items()
        if folder.is_absolute() and folder.is_dir()
    }
