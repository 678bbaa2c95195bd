# SPDX-License-Identifier: Apache-2.0
"""What this process has imported: files, modules, packages and versions, for the checks."""

import hashlib
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

from packaging.utils import canonicalize_name


def files_hash(folder: Path) -> str:
    """Hash over names, sizes and times of the Python files below `folder`."""
    stats = ((str(path), path.stat()) for path in sorted(folder.rglob("*.py")))
    lines = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def modules() -> dict[str, str]:
    """Imported top-level modules and the file of each.

    Also for the engine's other processes, which inherit this process's module path.
    """
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    return {k: file for k, file in files.items() if file and "." not in k and k != "__main__"}


def packages() -> dict[str, str]:
    """Every distribution on the module path, and its version."""
    versions: dict[str, str] = {}
    for distribution in distributions():  # in the order of the module path: the first counts
        versions.setdefault(canonicalize_name(distribution.metadata["Name"]), distribution.version)
    return versions


def versions(installed: Mapping[str, str]) -> dict[str, str]:
    """Versions and device, as the engine's process sees them.

    Args:
        installed: the result of `packages`.
    """
    import torch
    from vllm.platforms import current_platform

    names = ("vllm", "triton", "transformers", "custom-kernels")
    result = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: installed.get(name, "not installed") for name in names},
        "cuda": str(torch.version.cuda or "none"),
        "platform": current_platform.device_type,
    }
    if current_platform.device_type != "cpu":
        result["device"] = current_platform.get_device_name()
    return result
