# SPDX-License-Identifier: Apache-2.0
"""The ``.cu`` files of this package, and what each says that it needs.

A source says what it needs in comments of its own:

- ``// link: cublasLt cublas``: libraries of the environment, beside the CUDA runtime;
- ``// include: cutlass``: headers that come with a package (CUTLASS lies in flashinfer-python);
- ``// architectures: 9.0a``: the only ones it is written for; without it, all that are pinned;
- ``// dtypes: bfloat16 float16``: the only ones it takes.
"""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from custom_kernels import paths
from custom_kernels.compile import toolchain
from custom_kernels.operation import read_notes

if TYPE_CHECKING:
    import torch

DEFAULT_ARCHITECTURES = ("8.0", "9.0a", "10.0a", "12.0a")
LIBRARIES = ("cudart",)

_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """One ``.cu`` file: the compiled half of a backend."""

    operation: str
    backend: str
    path: Path

    @property
    def name(self) -> str:
        return f"{self.operation}.{self.backend}"

    def files(self) -> list[Path]:
        """The ``.cu`` and every file of this package that it includes, directly or not, sorted."""
        found: set[Path] = set()
        queue = [self.path]
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

    def libraries(self) -> list[str]:
        """What it links with, from its ``// link:`` comments, and the CUDA runtime."""
        return [*LIBRARIES, *self._needs("link")]

    def architectures(self, wanted: Iterable[str]) -> tuple[str, ...]:
        """Those of ``wanted`` that it is written for."""
        only = self._needs("architectures")
        return tuple(name for name in wanted if not only or name in only)

    def headers(self) -> list[tuple[Path, str]]:
        """Folder and package of the headers that it asks for. Raises toolchain.BuildError if one
        is missing."""
        return [toolchain.headers(name) for name in self._needs("include")]

    def _needs(self, what: str) -> list[str]:
        return read_notes(self.path).get(what, "").split()


def find_all() -> list[Source]:
    """Every ``.cu`` in an operation's folder, sorted by name."""
    return [
        Source(path.parent.name, path.stem, path)
        for path in sorted(paths.PACKAGE.glob("*/*.cu"))
        if (path.parent / "reference.py").is_file() and not path.stem.startswith("_")
    ]


def find(operation: str, backend: str) -> Source | None:
    """The source of a backend, None if it has no ``.cu``."""
    path = paths.PACKAGE / operation / f"{backend}.cu"
    return Source(operation, backend, path) if path.is_file() else None


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
    """What sources ask for with ``// include:``: name, folder, package with version. Raises
    toolchain.BuildError if one is missing."""
    names = sorted({name for source in find_all() for name in source._needs("include")})
    return [(name, *toolchain.headers(name)) for name in names]
