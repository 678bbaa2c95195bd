# SPDX-License-Identifier: Apache-2.0
"""Options: defaults by device, and one line for each value that cannot be."""

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.workspace.bench.samples import plan as sample
from tests.workspace.conftest import clean_environment
from workspace import bench
from workspace.bench.plan import (
    DEFAULTS,
    BenchOptions,
    Device,
    check_backend,
    check_memory,
    check_quantization,
    detect_device,
    plan,
    repeat_command,
)
from workspace.host.errors import WorkspaceError
from workspace.pins.model import load

CPU = Device("cpu", 2, "a CPU")
GPU = Device("cuda", 1, "a GPU")
MODEL = sample().model


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"input_len": "0"}, "INPUT_LEN=0"),
        ({"output_len": "-3"}, "OUTPUT_LEN=-3"),
        ({"num_prompts": "many"}, "NUM_PROMPTS=many"),
        ({"metric": "foo"}, "METRIC=foo: should be 'throughput' or 'latency'"),
        ({"repeats": "-1"}, "REPEATS=-1"),
        ({"rounds": "0"}, "ROUNDS=0"),
        ({"tp": "0"}, "TP=0"),
        ({"eager": "perhaps"}, "EAGER=perhaps"),
        ({"baseline": "mine"}, "BASELINE=mine"),
        ({"modle": "x"}, "MODLE=x"),
        (
            {"quantization": "sparse_2_4", "layers": "*"},
            "QUANTIZATION=sparse_2_4 selects its own kernels",
        ),
        ({"quantization": "sparse_2_4", "backend": "reference"}, "leave out BACKEND"),
        ({"quantization": "sparse_2_4", "baseline": "pristine"}, "leave out BASELINE"),
        ({"input_len": "0", "metric": "foo"}, "INPUT_LEN=0"),
    ],
)
def test_value_that_cannot_be_is_one_line_with_its_variable(
    given: dict[str, str], says: str
) -> None:
    with pytest.raises(WorkspaceError) as caught:
        bench.options(given)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_variables_are_as_good_as_none() -> None:
    assert bench.options(dict.fromkeys(BenchOptions.model_fields, "")) == BenchOptions()


def test_words_from_make_become_values() -> None:
    made = bench.options({"eager": "1", "tp": "2", "metric": "latency"})
    assert (made.eager, made.tp, made.metric) == (True, 2, "latency")
    assert bench.options({"eager": "0"}).eager is False


@pytest.mark.parametrize("metric", ["throughput", "latency"])
def test_defaults_follow_the_device(metric: str) -> None:
    options = BenchOptions(metric=metric)
    on_cpu, on_gpu = plan(options, CPU, MODEL), plan(options, GPU, MODEL)
    assert (on_cpu.eager, on_gpu.eager) == (True, False)
    assert on_cpu.input_len == DEFAULTS["cpu", metric]["input_len"]
    assert on_gpu.num_prompts == DEFAULTS["cuda", metric]["num_prompts"]
    assert on_cpu.tokens == (
        on_cpu.num_prompts * on_cpu.input_len,
        on_cpu.num_prompts * on_cpu.output_len,
    )


def test_default_rounds_are_enough_for_an_interval() -> None:
    made = plan(BenchOptions(), CPU, MODEL)
    assert made.repeats >= 2
    assert made.repeats * made.rounds >= 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (BenchOptions(tp=3), "TP=3: this machine has 2 CPU cores"),
        (BenchOptions(input_len=4000, output_len=97), "4096 tokens that tiny-qwen2 supports"),
    ],
)
def test_more_than_there_is_is_one_line(options: BenchOptions, says: str) -> None:
    with pytest.raises(WorkspaceError, match=says):
        plan(options, CPU, MODEL)


def test_workers_must_divide_the_heads() -> None:
    with pytest.raises(WorkspaceError, match="4 attention heads"):
        plan(BenchOptions(tp=3), replace(CPU, count=8), MODEL)


def test_defaults_fit_a_model_that_takes_few_tokens() -> None:
    short = replace(MODEL, config=MODEL.config | {"max_position_embeddings": 16})
    made = plan(BenchOptions(), CPU, short)
    assert made.input_len + made.output_len <= 16


def test_unknown_backend_names_those_there_are() -> None:
    check_backend(None, CPU)
    check_backend("reference", CPU)
    with pytest.raises(WorkspaceError, match=r"no such backend; usable here: .*reference"):
        check_backend("turbo", CPU)
    with pytest.raises(WorkspaceError, match=r"CUDA devices only; usable here: .*reference"):
        check_backend("cublaslt", CPU)


def test_unknown_quantization_methods_name_those_there_are() -> None:
    check_quantization(None)
    check_quantization("sparse_6_8")
    with pytest.raises(WorkspaceError, match=r"no such method in .*; known: .*sparse_2_4, "):
        check_quantization("sparse")


def test_model_larger_than_memory_is_refused_before_the_engine_starts() -> None:
    huge = replace(MODEL, config=MODEL.config | {"hidden_size": 2**17, "intermediate_size": 2**19})
    with pytest.raises(WorkspaceError, match="GiB of memory"):
        check_memory(sample(model=huge))
    check_memory(sample(model=huge, device=GPU))


def test_command_that_repeats_a_run_asks_for_the_same_run() -> None:
    made = sample(rounds=3, backend="reference", layers="*.mlp.*,lm_head")
    words = shlex.split(repeat_command(made))
    assert words[:2] == ["make", "bench"]
    given = {name.lower(): value for name, value in (word.split("=", 1) for word in words[2:])}
    given.pop("vllm_version", None)
    again = plan(bench.options(given), CPU, MODEL)
    assert again == made


def test_command_that_repeats_a_run_names_a_release_that_is_not_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    default = load().vllm.default
    other = next(version for version in load().vllm.release if version != default)
    for version, named in ((other, True), (default, False)):
        monkeypatch.setenv("WORKSPACE_RELEASE", version)
        assert (f" VLLM_VERSION={version}" in repeat_command(sample())) is named


def test_installed_engine_decides_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    found = detect_device()
    assert found.name
    if found.kind == "cpu":
        assert found.count == len(os.sched_getaffinity(0))


def test_missing_engine_or_gpu_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workspace.bench.plan.version", lambda _: "0.25.1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(WorkspaceError, match="no GPU is visible; run make dev DEVICE=cpu"):
        detect_device()


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "eine Größe ü",
        "it's",
        "a$b",
        "$HOME",
        "$(x)",
        "(1)",
        'a "b"',
        "a\\b",
        "#1;&*?[~",
        " l\n",
    ],
)
def test_folder_is_repeated_through_the_shell_and_make(name: str, tmp_path: Path) -> None:
    """What make hands to the bench is the folder, letter for letter."""
    (tmp_path / "Makefile").write_text('bench:\n\t@printf \'%s\\0%s\' "$$MODEL" "$$LAYERS"\n')
    folder = Path("/models") / name
    local = replace(MODEL, folder=Path("/made"), name="c", path_asked_for=folder)
    line = repeat_command(sample(model=local, layers=f"*.{name}"))
    assert shlex.split(line)[:2] == ["make", "bench"]
    seen = subprocess.run(
        ["sh", "-c", line], cwd=tmp_path, env=clean_environment(), capture_output=True, check=True
    ).stdout
    assert seen.decode().split("\0") == [str(folder), f"*.{name}"]
