# SPDX-License-Identifier: Apache-2.0
"""The launch log is right at any moment, however the process ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from custom_kernels import launches


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(launches.ENVIRONMENT, raising=False)
    launches.reset()
    yield
    launches.reset()


def test_counts_in_process_without_a_log() -> None:
    launches.record("gemm", "a")
    launches.record("gemm", "a")
    launches.record("gemm", "b")
    assert launches.counts() == {"gemm.a": 2, "gemm.b": 1}


def test_log_survives_sigkill(tmp_path: Path) -> None:
    program = (
        "import os, signal\n"
        "from custom_kernels import launches\n"
        "for _ in range(70_000): launches.record('gemm', 'a')\n"
        "launches.record('gemm', 'b')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, launches.ENVIRONMENT: str(tmp_path / "log")}
    process = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert process.returncode == -signal.SIGKILL
    (counts,) = launches.read(tmp_path / "log").values()
    assert counts == {"gemm.a": 70_000, "gemm.b": 1}


def test_threads_lose_no_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launches.ENVIRONMENT, str(tmp_path))

    def work() -> None:
        for _ in range(5_000):
            launches.record("gemm", "a")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert launches.read(tmp_path) == {os.getpid(): {"gemm.a": 20_000}}


def test_a_forked_child_counts_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launches.ENVIRONMENT, str(tmp_path))
    launches.record("gemm", "a")
    child = multiprocessing.get_context("fork").Process(
        target=launches.record, args=("gemm", "child")
    )
    child.start()
    child.join()
    assert launches.read(tmp_path) == {
        os.getpid(): {"gemm.a": 1},
        child.pid: {"gemm.child": 1},
    }


def test_a_name_that_does_not_fit_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launches.ENVIRONMENT, str(tmp_path))
    with pytest.raises(ValueError, match=r"launch log: .* shorten the backend's file name"):
        launches.record("gemm", "b" * 300)


def test_reading_a_folder_that_is_not_there_gives_nothing(tmp_path: Path) -> None:
    assert launches.read(tmp_path / "absent") == {}


def test_layers_by_their_weights_and_tokens_by_buckets_are_counted_and_survive_sigkill(
    tmp_path: Path,
) -> None:
    name = "language_model.model.layers.11.mlp.shared_experts." + "x" * 100
    program = (
        "import os, signal, sys\n"
        "from custom_kernels import launches\n"
        "launches.layer(sys.argv[1], 4096)\n"
        "launches.layer('idle', 8192)\n"
        "launches.layer('embedding', 12288, expected=False)\n"
        "for _ in range(1000): launches.record('gemm', 'a', 4096, tokens=57)\n"
        "launches.record('gemm', 'b', 4096)\n"
        "launches.record('gemm', 'b', 5000)\n"
        "launches.record('quant_expand', 'a', tokens=1)\n"
        "launches.record('quant_expand', 'a', tokens=65536)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, launches.ENVIRONMENT: str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", program, name], env=environment, check=False)
    assert process.returncode == -signal.SIGKILL
    (counts,) = launches.read(tmp_path).values()
    assert counts == {"gemm.a": 1000, "gemm.b": 2, "quant_expand.a": 2}
    (layers,) = launches.read_layers(tmp_path).values()
    assert layers == {name: {"gemm.a": 1000, "gemm.b": 1}, "idle": {}}
    (tokens,) = launches.read_tokens(tmp_path).values()
    assert tokens == {"gemm.a": {64: 1000}, "quant_expand.a": {1: 1, 65536: 1}}


def test_a_process_with_layers_and_no_launch_launched_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launches.ENVIRONMENT, str(tmp_path))
    launches.layer("lm_head", 4096)
    assert launches.read(tmp_path) == {}
    assert launches.read_layers(tmp_path) == {os.getpid(): {"lm_head": {}}}


def test_layers_without_a_log_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    launches.layer("lm_head", 4096)
    launches.record("gemm", "a", 4096)
    assert launches.counts() == {"gemm.a": 1}
    assert launches._layers == {}
