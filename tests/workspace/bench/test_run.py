# SPDX-License-Identifier: Apache-2.0
"""`make bench` as a whole: the real engine, stock and custom, and the ways in which it can end."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.language_model import LanguageModel
from tests.workspace.bench import sparse_folder
from tests.workspace.conftest import still_running
from workspace.bench import checks, measure, pristine, record, runner, variants, workload
from workspace.bench.guards import only_bench
from workspace.bench.plan import Plan
from workspace.environment import progress
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT
from workspace.pins import release
from workspace.verbs import Bench

BENCH = """
import sys
from pathlib import Path
from workspace.bench import runner
from workspace.host.errors import WorkspaceError
from workspace.host.options import read
from workspace.verbs import Bench
here = Path(sys.argv[1])
runner.RESULTS, runner.RUNS = here / "results", here / "runs"
runner.LOGS, runner.LOCK = here / "logs", here / "lock"
try:
    runner.run(read(Bench, dict(a.split("=") for a in sys.argv[2:])))
except WorkspaceError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""
"""`make bench` in folders of its own, so that it meets neither the user's records nor a lock."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runner, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(runner, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(runner, "LOCK", tmp_path / "lock")
    return tmp_path


@pytest.mark.engine
@pytest.mark.slow
def test_stock_and_custom_run_and_the_record_proves_itself(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "LIMIT_SECONDS", 1.0)  # too short for more than the fewest rounds
    monkeypatch.setattr(progress, "LOG_SECONDS", 1.0)
    # By every way, in the release without the fork's patches; the fork runs in the tests below.
    monkeypatch.setattr(pristine, "TREE", here / "pristine")
    kept: list[tuple[Plan, list[measure.ProcessRun]]] = []

    def measure_and_keep(*arguments: Any, **options: Any) -> tuple[Plan, list[measure.ProcessRun]]:
        kept.append(measure.measure(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr(runner, "measure", measure_and_keep)
    ops = "gemm,rms_norm,silu_and_mul.reference,rotary_embedding,paged_attention"
    sizes = {"input_len": 16, "output_len": 8, "num_prompts": 4, "repeats": 1}
    runner.run(Bench(op=ops, engine="released", **sizes))
    (path,) = (here / "results").glob("*.json")
    made = record.read(path)
    assert made.valid
    stock, custom = made.variants
    for variant in made.variants:
        (process,) = variant.processes
        assert len(process.rounds) == made.settings.rounds == 3
        for done in process.rounds:
            assert (done.prompt_tokens, done.output_tokens) == (4 * 16, 4 * 8)
            assert done.reported_tokens == 4 * 24
    assert stock.launches == {}
    assert {name.partition(".")[0] for name in custom.launches} == {
        "gemm", "rms_norm", "silu_and_mul", "rotary_embedding", "paged_attention",
    }  # fmt: skip
    assert len(custom.processes[0].launches) == 1
    for variant in made.variants:
        assert str(here / "pristine") in variant.processes[0].vllm_folder
    (counted,) = custom.processes[0].layers.values()
    assert counted["model.layers.1.mlp.act_fn"].keys() == {"silu_and_mul.reference"}
    assert counted["model.layers.1.mlp.down_proj"].keys() == {"gemm.reference"}
    assert counted["model.layers.1.self_attn.attn"].keys() == {"paged_attention.reference"}
    assert [variant.processes[0].attention for variant in made.variants] == [["CPU_ATTN"]] * 2
    # Two norms in each of two layers and one at the end, one activation in each, one rotation.
    assert sum(any("rms_norm" in kernel for kernel in ran) for ran in counted.values()) == 5
    (tokens,) = custom.processes[0].tokens.values()
    launched = {kernel: sum(calls.values()) for kernel, calls in tokens.items()}
    assert launched == custom.launches
    assert min(min(calls) for calls in tokens.values()) <= 4  # decoding 4 requests
    assert made.agreement.tokens > 0
    assert made.agreement.failures == []
    assert made.comparison.verdict == "ambiguous"  # one pair cannot say more
    assert len(made.provenance.kernels) == 64
    assert path.with_suffix(".png").stat().st_size > 10_000
    printed = capfd.readouterr().out
    for words in ("random weights", "only the ratio", "greedy tokens match", "make bench MODEL=",
                  "vLLM's own attention: CPU_ATTN in stock; CPU_ATTN in custom",
                  "workload: INPUT_LEN=16 OUTPUT_LEN=8 NUM_PROMPTS=4 REPEATS=1 ROUNDS=5 ",
                  "time:     about ", "1/2 stock: importing vLLM, about ",
                  "1/2 stock: starting the engine, about ", "2/2 custom: done in ",
                  "3 rounds of 5 because time is short", " ROUNDS=3 "):  # fmt: skip
        assert words in printed
    assert not list((here / "runs").iterdir())

    # The fork, with the same switches: the same kernels, tokens and log-probabilities, bit by bit.
    ((plan, (_, released)),) = kept
    folders = {"folder": here / "fork", "logs": here / "logs"}
    _, (fork,) = measure.measure(plan, (variants.custom(plan),), {}, **folders, limit=None)
    assert Path(fork.result.vllm_folder).is_relative_to(release.tree().resolve())
    (ran,) = fork.result.layers.values()
    assert {name: set(kernels) for name, kernels in ran.items()} == {
        name: set(kernels) for name, kernels in counted.items()
    }
    assert fork.result.generations == released.result.generations


@pytest.mark.engine
@pytest.mark.slow
def test_a_sparse_model_agrees_with_its_own_weights_as_dense_ones(
    here: Path, trained_model: LanguageModel, capfd: pytest.CaptureFixture[str]
) -> None:
    # On a CPU vLLM multiplies fp8 exactly on any machine, int8 on a newer one only.
    folder = sparse_folder.write(trained_model.folder, here / "sparse", "fp8")
    sizes = {"input_len": 16, "output_len": 8, "num_prompts": 4, "repeats": 1, "rounds": 3}
    made = runner.run(Bench(model=str(folder), metric="latency", **sizes))
    assert made.valid
    assert not made.agreement.lossy
    assert made.agreement.matched >= 0.9 * made.agreement.tokens
    dense, sparse = made.variants
    assert (dense.name, dense.launches) == ("fp8", {})
    assert "--hf-overrides" in dense.command
    assert "--hf-overrides" not in sparse.command
    (layers,) = sparse.processes[0].layers.values()
    assert len(layers) == 4 * 2  # qkv, o, gate_up and down of two layers
    assert all(counts["sparse_gemm.reference"] > 0 for counts in layers.values())
    printed = capfd.readouterr().out
    assert "real weights, 2:4 fp8, bfloat16" in printed
    assert "fp8 loads the same weights as dense ones" in printed
    assert made.command.endswith(" BASELINE=fp8")


@pytest.mark.engine
@pytest.mark.slow
def test_rays_workers_get_the_switches_and_give_their_counts(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two CPU cores")
    seen: set[psutil.Process] = set()
    sizes = {"input_len": 16, "output_len": 8, "num_prompts": 4, "repeats": 1, "rounds": 1}
    plan, expected = runner.prepare(Bench(op="gemm,rms_norm", tp=2, executor="ray", **sizes))
    folders = {"folder": here / "run", "logs": here / "logs"}
    custom = (variants.custom(plan),)
    with listening(seen) as addresses:
        try:
            _, (run,) = measure.measure(plan, custom, expected, **folders, limit=None)
        except WorkspaceError as error:
            # Ray gives parts of itself 15 s to start, which a busy machine may not have.
            if re.search(r"\bray\b|raylet|\bgcs\b|current node", str(error), re.IGNORECASE):
                pytest.skip(f"Ray did not start: {error}")
            raise
    assert len(seen) > 4  # an engine, with Ray's own processes and its workers
    assert still_running([process for process in seen if process.is_running()]) == []
    # But for vLLM's own store, by which Ray's workers find each other.
    assert addresses - {"::"} <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert checks.launches(plan, "custom", run.result, expected=True) == []
    assert checks.layers("*", "custom", run.result) == []
    assert checks.tokens(plan, "custom", run.result) == []
    assert run.result.launches.keys() == run.result.layers.keys() == {0, 1}
    for counted in run.result.layers.values():  # by rank
        assert {"lm_head", "model.norm", "model.layers.1.mlp.down_proj"} <= counted.keys()


@pytest.mark.engine
@pytest.mark.slow
def test_custom_kernels_run_in_every_layer_of_every_pipeline_stage(here: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two CPU cores")
    sizes = {"input_len": 16, "output_len": 8, "num_prompts": 4, "repeats": 1, "rounds": 1}
    plan, expected = runner.prepare(Bench(op="gemm,rms_norm", pp=2, **sizes))
    custom = (variants.custom(plan),)
    folders = {"folder": here / "run", "logs": here / "logs"}
    _, (run,) = measure.measure(plan, custom, expected, **folders, limit=None)
    assert checks.launches(plan, "custom", run.result, expected=True) == []
    assert checks.layers("*", "custom", run.result) == []
    assert checks.tokens(plan, "custom", run.result) == []
    stages = [counted.keys() for counted in run.result.layers.values()]
    first, last = stages if "lm_head" in stages[1] else stages[::-1]
    assert not first & last
    assert "model.layers.0.mlp.down_proj" in first
    assert {"model.layers.1.mlp.down_proj", "model.norm", "lm_head"} <= last


@contextmanager
def listening(seen: set[psutil.Process] | None = None) -> Iterator[set[str]]:
    """The addresses on which processes that this one starts meanwhile wait for connections; the
    processes are added to those in `seen`."""
    found: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                if seen is not None:
                    seen.add(process)
                with suppress(psutil.Error):
                    found.update(
                        connection.laddr.ip
                        for connection in process.net_connections("inet")
                        if connection.status == psutil.CONN_LISTEN
                    )

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


@pytest.mark.engine
@pytest.mark.slow
def test_a_server_is_measured_as_its_clients_see_it(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "LIMIT_SECONDS", 1.0)  # too short for more than the fewest rounds
    before = psutil.Process().children(recursive=True)
    sizes = {"input_len": 16, "output_len": 8, "num_prompts": 4, "repeats": 1}
    with listening() as addresses:
        made = runner.run(Bench(metric="serve", goodput="ttft:600000 tpot:600000", **sizes))
    assert psutil.Process().children(recursive=True) == before
    assert addresses == {"127.0.0.1"}
    assert made.valid
    stock, custom = made.variants
    for variant in made.variants:
        (process,) = variant.processes
        assert len(process.rounds) == 3
        for done in process.rounds:
            assert (done.prompt_tokens, done.output_tokens) == (4 * 16, 4 * 8)
            assert done.reported_tokens == 4 * 24  # by the engine's own counters
            assert done.served is not None
            assert 0 < done.served.ttft_ms <= done.served.ttft_p99_ms
            # On a busy machine all tokens of a request may come in one piece: 0.
            assert 0 <= done.served.tpot_ms <= done.served.tpot_p99_ms
            assert done.served.requests_per_s == pytest.approx(4 / done.elapsed_s)
            assert done.served.good_per_s == done.served.requests_per_s
    assert stock.launches == {}
    assert set(custom.launches) == {"gemm.reference"}
    (counts,) = custom.processes[0].launches.values()
    assert counts == custom.launches
    assert made.agreement.tokens > 0
    assert made.agreement.failures == []
    assert len(made.figures) == 5
    compared = [one for one in made.figures if "per output token" not in one.name]
    assert len(compared) == 3
    assert all(one.comparison for one in compared)
    (path,) = (here / "results").glob("*-serve.json")
    assert record.read(path) == made
    printed = capfd.readouterr().out
    for words in ("requests served,", "time to first token, median",
                  "4 requests at once", "greedy tokens match", " GOODPUT="):  # fmt: skip
        assert words in printed


def start(here: Path, **variables: str) -> subprocess.Popen[str]:
    """Start a bench and wait until its engine process is importing vLLM."""
    before = set(here.glob("runs/*/*/events.jsonl"))
    words = [f"{name}={value}" for name, value in variables.items()]
    process = subprocess.Popen(
        [sys.executable, "-c", BENCH, str(here), *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not set(here.glob("runs/*/*/events.jsonl")) - before:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.1)
    return process


def server_of(bench: subprocess.Popen[str]) -> psutil.Process:
    """The server that the engine process of a bench has started, or is about to."""
    (engine,) = psutil.Process(bench.pid).children()
    while not (children := engine.children()):
        time.sleep(0.1)
    (server,) = children
    return server


@pytest.mark.engine
@pytest.mark.parametrize(
    ("number", "metric"),
    [(signal.SIGINT, "latency"), (signal.SIGTERM, "throughput"), (signal.SIGINT, "serve")],
)
def test_interrupted_it_says_so_and_leaves_neither_process_nor_record(
    number: signal.Signals, metric: str, tmp_path: Path
) -> None:
    process = start(tmp_path, METRIC=metric)
    if metric == "serve":
        server_of(process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 1
    assert error.strip().startswith("interrupted")
    assert "\n" not in error.strip()
    assert still_running(children) == []
    assert not (tmp_path / "results").exists()


@pytest.mark.engine
def test_killed_it_takes_the_engine_along_and_the_next_run_starts_clean(tmp_path: Path) -> None:
    first = start(tmp_path)
    children = psutil.Process(first.pid).children(recursive=True)
    assert children
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert still_running(children) == []
    (left,) = (tmp_path / "runs").iterdir()
    time.sleep(1.1)  # runs are named by the second
    second = start(tmp_path)
    assert not left.exists()
    second.send_signal(signal.SIGINT)
    second.communicate()
    assert not (tmp_path / "results").exists()


@pytest.mark.engine
def test_an_engine_that_dies_is_one_line_with_its_log(tmp_path: Path) -> None:
    process = start(tmp_path)
    (engine,) = psutil.Process(process.pid).children()
    engine.send_signal(signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 1
    assert "stock: the engine was killed (signal 9)" in error
    log = Path(error.strip().rsplit("log: ", 1)[1])
    assert log.is_file()
    assert "\n" not in error.strip()


@pytest.mark.engine
def test_a_server_that_dies_is_one_line_with_its_log(tmp_path: Path) -> None:
    process = start(tmp_path, METRIC="serve")
    server_of(process).send_signal(signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 1
    assert "stock: the engine was killed (signal 9)" in error
    assert Path(error.strip().rsplit("log: ", 1)[1]).is_file()
    assert "\n" not in error.strip()


def test_a_second_bench_in_the_checkout_says_who_holds_it(here: Path) -> None:
    with (
        only_bench(runner.LOCK),
        pytest.raises(WorkspaceError, match=f"process {os.getpid()}") as caught,
    ):
        runner.run(Bench())
    assert "\n" not in str(caught.value)
    with only_bench(runner.LOCK):
        pass  # given back


@pytest.mark.parametrize(
    "options",
    [
        Bench(model="no/such-model"),
        Bench(backend="turbo"),
        Bench(input_len=5000),
        Bench(tp=4096),
    ],
)
def test_what_cannot_be_run_is_one_line_before_an_engine_starts(
    options: Bench, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WorkspaceError) as caught:
        runner.run(options)
    assert "\n" not in str(caught.value)
    assert not (here / "runs").exists()


def test_a_place_that_cannot_be_written_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(here / "runs" / "job.json"))

    def fail(*_: object, **__: object) -> None:
        raise full

    monkeypatch.setattr(runner, "measure", fail)
    with pytest.raises(WorkspaceError, match=r"job\.json: No space left on device; free") as caught:
        runner.run(Bench())
    assert "\n" not in str(caught.value)


def test_nothing_of_the_engine_is_imported_before_it_starts() -> None:
    code = (
        "import sys, json; from workspace import cli; from workspace.bench import runner; "
        "print(json.dumps([m for m in ('torch', 'vllm', 'matplotlib') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert json.loads(done.stdout) == []
