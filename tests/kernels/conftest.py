# SPDX-License-Identifier: Apache-2.0
"""A copy of the kernels package that a test may change, with a cache of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from custom_kernels import paths, registry

if not torch.cuda.is_available():
    # Triton reads it while it is imported; where it is set, kernels run on tensors of the CPU.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before its interpreter could be chosen")
    os.environ["TRITON_INTERPRET"] = "1"


torch.set_num_threads(1)  # tensors are small here, and the other cores are at work


GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu() -> torch.device:
    """For tests marked ``gpu``."""
    assert torch.cuda.is_available()
    return GPU


@pytest.fixture
def device(request: pytest.FixtureRequest, backend: str) -> torch.device:
    """A device that the backend of the module's OPERATION runs on, or a skip with the reason."""
    operation: registry.Operation = request.module.OPERATION
    reasons = []
    for device in (GPU, torch.device("cpu")):
        reason = operation.backend(backend).unavailable_reason(device)
        if reason is None:
            return device
        reasons.append(f"{device.type}: {reason}")
    pytest.skip(f"{backend} runs on no device here: {'; '.join(reasons)}")


@dataclass(frozen=True)
class PackageCopy:
    """``package`` is a copy of custom_kernels without its operations; ``cache`` is where it
    compiles to."""

    root: Path
    cache: Path

    @property
    def package(self) -> Path:
        return self.root / "custom_kernels"

    def add(self, path: str, text: str) -> Path:
        """Write a file of the package, for example ``toy/reference.py``."""
        file = self.package / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(self.root),
            "CUSTOM_KERNELS_CACHE": str(self.cache),
        }

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run this interpreter on the copy."""
        return subprocess.run(
            [sys.executable, *arguments],
            env=self.environment(),
            cwd=self.root,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def package_copy(tmp_path: Path) -> PackageCopy:
    return copy_package(tmp_path)


def copy_package(folder: Path) -> PackageCopy:
    # nvcc hands names to a shell without quotes: folders are named as people name them.
    odd = folder / "my work (1) ü" / "it's here"
    copy = PackageCopy(odd / "copy", odd / "cache")
    left_out = shutil.ignore_patterns(*map(str, registry.operations()), "__pycache__", "*.cu")
    shutil.copytree(paths.PACKAGE, copy.package, ignore=left_out)
    return copy
