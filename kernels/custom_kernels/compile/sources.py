# SPDX-License-Identifier: Apache-2.0
"""The ``.cu`` files of this package, and what each says that it needs.

A source lists its needs in comments:

- ``// link: cublasLt cublas``: libraries of the environment, beside the CUDA runtime;
- ``// include: cutlass``: headers of a package (CUTLASS is in flashinfer-python);
- ``// architectures: 9.0a``: the only ones it is written for; by default all that are pinned;
- ``// dtypes: bfloat16 float16``: the only ones it supports.
"""

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from custom_kernels import paths, registry
from custom_kernels.compile import toolchain
from custom_kernels.operation import Backend

if TYPE_CHECKING:
    import torch

DEFAULT_ARCHITECTURES = ("8.0", "9.0a", "10.0a", "12.0a")

_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def files(backend: Backend) -> list[Path]:
    """The ``.cu`` and every file of this package that it includes, directly or not, sorted; none
    for a backend without a ``.cu``."""
    found: set[Path] = set()
    queue = [backend.cuda] if backend.cuda.is_file() else []
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found.add(path)
        for include in _INCLUDE.findall(path.read_text()):
            for folder in (path.parent, paths.PACKAGE):
                if (folder / include).is_file():
                    queue.append((folder / include).resolve())
                    break
    return sorted(found)


def libraries(backend: Backend) -> list[str]:
    """What the ``.cu`` links with: the CUDA runtime, and what its ``// link:`` comments name."""
    return ["cudart", *backend.needs("link")]


def headers(backend: Backend) -> list[tuple[Path, str]]:
    """Folder and package of the headers that the ``.cu`` asks for. Raises toolchain.BuildError if
    one is missing."""
    return [toolchain.headers(name) for name in backend.needs("include")]


def pinned_architectures() -> tuple[str, ...]:
    """``[cuda] architectures`` of the checkout's pins.toml, or the default when there is none."""
    root = paths.checkout()
    if root is None:
        return DEFAULT_ARCHITECTURES
    pins = tomllib.loads((root / "pins.toml").read_text())
    return tuple(pins.get("cuda", {}).get("architectures", DEFAULT_ARCHITECTURES))


def architecture(device: "torch.device") -> str:
    """The architecture to compile for on this device: ``9.0a`` on compute capability 9.0."""
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    # From Hopper on, the instructions that matter (wgmma, tcgen05) need the architecture-specific
    # target.
    return f"{major}.{minor}{'a' if major >= 9 else ''}"


def header_packages() -> list[tuple[str, Path, str]]:
    """What ``.cu`` files ask for with ``// include:``: name, folder, package with version. Raises
    toolchain.BuildError if one is missing."""
    names = sorted({name for backend in registry.compiled() for name in backend.needs("include")})
    return [(name, *toolchain.headers(name)) for name in names]
