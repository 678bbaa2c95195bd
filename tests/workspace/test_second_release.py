# SPDX-License-Identifier: Apache-2.0
"""The other supported releases, whole: from a fresh checkout to their engines with our kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workspace.conftest import (
    ODD,
    SMALL_BENCH,
    Checkout,
    clean_environment,
    copy_files_of_this_checkout,
    require_space,
)
from workspace.bench import record
from workspace.host.paths import ROOT
from workspace.pins.model import load

GIGABYTES = 20
"""That the environments of two releases take."""
DEFAULT = load().vllm.default
*OTHERS, OLDEST = (version for version in load().vllm.release if version != DEFAULT)


@pytest.fixture
def fresh_checkout(tmp_path: Path) -> Iterator[Checkout]:
    """A clone of this checkout, edits included; nothing is set up in it. Downloads come from the
    user's caches."""
    require_space(tmp_path, GIGABYTES)
    root = tmp_path / ODD / "vllm kernels"
    subprocess.run(["git", "clone", "-q", f"file://{ROOT}", str(root)], check=True)
    copy_files_of_this_checkout(root)
    yield Checkout(root, clean_environment())
    shutil.rmtree(root)  # its environments take gigabytes where the cache is on another disk


@pytest.mark.engine
@pytest.mark.slow
def test_the_other_releases_run_from_a_fresh_checkout_to_the_bench(
    fresh_checkout: Checkout,
) -> None:
    made = fresh_checkout.make("dev", f"VLLM_VERSION={OLDEST}")
    assert made.returncode == 0, made.stdout
    benched(fresh_checkout, OLDEST)
    for version in OTHERS:  # without `make dev`, which would compile every kernel in CUDA C++
        benched(fresh_checkout, version)
    assert os.readlink(fresh_checkout.src) == f"releases/{OLDEST}"
    assert not (fresh_checkout.root / ".venv").exists()  # the default release's


def benched(checkout: Checkout, version: str) -> None:
    """Run stock against custom with a release, which proves itself."""
    ran = checkout.make("bench", f"VLLM_VERSION={version}", *SMALL_BENCH)
    assert ran.returncode == 0, ran.stdout
    found = record.read(max((checkout.root / "benchmarks" / "results").glob("*.json")))
    assert found.valid
    assert found.provenance.environment["vllm"] == f"{version}+cpu"
    assert found.provenance.environment["torch"].split("+")[0] == load().release(version).torch
    stock, custom = found.variants
    assert stock.launches == {}
    assert sum(custom.launches.values()) > 0
    for variant in found.variants:
        (process,) = variant.processes
        assert checkout.root / process.vllm_folder == checkout.tree(version) / "vllm"
