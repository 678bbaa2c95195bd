# SPDX-License-Identifier: Apache-2.0
"""The identity of the kernels follows what they are made of and how they run, and nothing else."""

from __future__ import annotations

import pytest
from custom_kernels import paths
from custom_kernels.compile import build
from custom_kernels.source_hash import source_hash

from tests.kernels.conftest import PackageCopy

FILES = {
    "toy/__init__.py": "", "toy/reference.py": "", "toy/cases.py": "", "toy/_packing.py": "",
    "toy/fast.cu": "", "toy/fast.py": "", "toy/scale.cuh": "", "toy/tuning/GPU.json": "{}",
}  # fmt: skip


@pytest.fixture
def toy(package_copy: PackageCopy, monkeypatch: pytest.MonkeyPatch) -> PackageCopy:
    for path, text in FILES.items():
        package_copy.add(path, text)
    monkeypatch.setattr(paths, "PACKAGE", package_copy.package)
    return package_copy


def append(copy: PackageCopy, path: str) -> None:
    file = copy.package / path
    file.write_text(file.read_text() + "\n")


@pytest.mark.parametrize(
    "path",
    [
        "bench/plots.py", "inspect/table.py", "check/case.py", "compile/build.py",
        "tuning/adopt.py", "profile/text.py", "sanitize.py", "toy/cases.py",
    ],
)  # fmt: skip
def test_what_changes_no_kernel_leaves_it(toy: PackageCopy, path: str) -> None:
    before = source_hash()
    append(toy, path)
    assert source_hash() == before


@pytest.mark.parametrize(
    "path",
    [*sorted(FILES.keys() - {"toy/cases.py"}), "registry.py", "tuned.py", "vllm/gemm_hook.py"],
)
def test_what_a_kernel_is_made_of_changes_it(toy: PackageCopy, path: str) -> None:
    before = source_hash()
    append(toy, path)
    assert source_hash() != before


def test_the_compilers_flags_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_hash()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DEXTRA"))
    assert source_hash() != before
