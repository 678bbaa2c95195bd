# SPDX-License-Identifier: Apache-2.0
"""The other supported release, whole: from a fresh checkout to its own engine with our kernel."""

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
)
from workspace.bench import record
from workspace.host.paths import ROOT
from workspace.pins.model import load

DEFAULT = load().vllm.default
OTHER = next(version for version in load().vllm.release if version != DEFAULT)


@pytest.fixture
def fresh_checkout(tmp_path: Path) -> Iterator[Checkout]:
    """A clone of this checkout, edits included; nothing is set up in it. Downloads come from the
    user's caches."""
    root = tmp_path / ODD / "vllm kernels"
    subprocess.run(["git", "clone", "-q", f"file://{ROOT}", str(root)], check=True)
    copy_files_of_this_checkout(root)
    yield Checkout(root, clean_environment())
    shutil.rmtree(root)  # its environment takes gigabytes where the cache is on another disk


@pytest.mark.engine
@pytest.mark.slow
def test_the_other_release_runs_from_a_fresh_checkout_to_the_bench(
    fresh_checkout: Checkout,
) -> None:
    asked = f"VLLM_VERSION={OTHER}"
    made = fresh_checkout.make("dev", asked)
    assert made.returncode == 0, made.stdout
    assert os.readlink(fresh_checkout.src) == f"releases/{OTHER}"
    assert not (fresh_checkout.root / ".venv").exists()  # the default release's

    ran = fresh_checkout.make("bench", asked, *SMALL_BENCH)
    assert ran.returncode == 0, ran.stdout
    (path,) = (fresh_checkout.root / "benchmarks" / "results").glob("*.json")
    found = record.read(path)
    assert found.valid
    assert found.provenance.environment["vllm"] == f"{OTHER}+cpu"
    assert found.provenance.environment["torch"].split("+")[0] == load().release(OTHER).torch
    stock, custom = found.variants
    assert stock.launches == {}
    assert sum(custom.launches.values()) > 0
    for variant in found.variants:
        (process,) = variant.processes
        imported = fresh_checkout.root / process.vllm_folder
        assert imported == fresh_checkout.tree(OTHER) / "vllm"
