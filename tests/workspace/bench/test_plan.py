# SPDX-License-Identifier: Apache-2.0
"""Options: defaults by device, and one line for each value that cannot be."""

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.workspace.bench.samples import plan as sample
from tests.workspace.bench.samples import sparse_model
from tests.workspace.conftest import clean_environment
from workspace.bench import operations
from workspace.bench.plan import (
    DEFAULTS,
    Device,
    check_memory,
    check_quantization,
    detect_device,
    make_plan,
    repeat_command,
)
from workspace.bench.record import Metric, Settings
from workspace.host.errors import WorkspaceError
from workspace.host.options import read
from workspace.pins import release
from workspace.pins.model import load
from workspace.verbs import Bench

CPU = Device("cpu", 2, "a CPU")
GPU = Device("cuda", 1, "a GPU")
MODEL = sample().model


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"INPUT_LEN": "0"}, "INPUT_LEN=0"),
        ({"OUTPUT_LEN": "-3"}, "OUTPUT_LEN=-3"),
        ({"NUM_PROMPTS": "many"}, "NUM_PROMPTS=many"),
        ({"TP": "0"}, "TP=0"),
        ({"REPEATS": "-1"}, "REPEATS=-1"),
        ({"ROUNDS": "0"}, "ROUNDS=0"),
        ({"REPEATS": "101"}, "REPEATS=101 is more than 100"),
        ({"ROUNDS": "1001"}, "ROUNDS=1001 is more than 1000"),
        (
            {"METRIC": "foo"},
            "METRIC=foo is not known; use METRIC=throughput, METRIC=latency or METRIC=serve",
        ),
        ({"EAGER": "perhaps"}, "EAGER=perhaps"),
        ({"BASELINE": "mine"}, "BASELINE=mine"),
        (
            {"QUANTIZATION": "sparse_2_4", "LAYERS": "*"},
            "QUANTIZATION=sparse_2_4 selects its own kernels",
        ),
        ({"QUANTIZATION": "sparse_2_4", "BACKEND": "reference"}, "leave out BACKEND"),
        ({"QUANTIZATION": "sparse_2_4", "BASELINE": "pristine"}, "leave out BASELINE"),
        ({"QUANTIZATION": "sparse_2_4", "OP": "rms_norm"}, "leave out OP"),
        ({"WAY": "ir", "LAYERS": "*"}, "leave out LAYERS"),
        ({"ENGINE": "released", "BASELINE": "pristine"}, "leave out one of them"),
        ({"BASELINE": "self", "OP": "gemm", "LAYERS": "*"}, "leave out OP and LAYERS"),
    ],
)
def test_an_invalid_value_is_one_line_with_its_variable(given: dict[str, str], says: str) -> None:
    with pytest.raises(WorkspaceError) as caught:
        read(Bench, given)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_eager_is_what_the_variable_says() -> None:
    for value, eager in (("1", True), ("0", False), ("", True)):
        assert make_plan(read(Bench, {"EAGER": value}), CPU, MODEL).eager is eager


@pytest.mark.parametrize("metric", ["throughput", "latency", "serve"])
def test_defaults_follow_the_device(metric: Metric) -> None:
    options = Bench(metric=metric)
    on_cpu, on_gpu = make_plan(options, CPU, MODEL), make_plan(options, GPU, MODEL)
    assert (on_cpu.eager, on_gpu.eager) == (True, False)
    assert on_cpu.input_len == DEFAULTS["cpu", metric].input_len
    assert on_gpu.num_prompts == DEFAULTS["cuda", metric].num_prompts
    assert on_cpu.input_tokens_per_round == on_cpu.num_prompts * on_cpu.input_len


def test_default_rounds_are_enough_for_an_interval() -> None:
    made = make_plan(Bench(), CPU, MODEL)
    assert made.repeats >= 2
    assert made.repeats * made.rounds >= 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Bench(tp=3), "TP=3: this machine has 2 CPU cores; lower TP$"),
        (Bench(tp=2, pp=2), "TP=2 PP=2: this machine has 2 CPU cores; lower TP or PP$"),
        (Bench(tp=3, executor="ray"), "TP=3: this machine has 2 CPU cores"),
        (Bench(input_len=4000, output_len=97), "4096 tokens that tiny-qwen2 supports"),
    ],
)
def test_more_than_there_is_is_one_line(options: Bench, says: str) -> None:
    with pytest.raises(WorkspaceError, match=says):
        make_plan(options, CPU, MODEL)


def test_workers_must_divide_the_heads_and_have_layers() -> None:
    with pytest.raises(WorkspaceError, match="4 attention heads"):
        make_plan(Bench(tp=3), replace(CPU, count=8), MODEL)
    with pytest.raises(WorkspaceError, match="PP=3: tiny-qwen2 has 2 layers"):
        make_plan(Bench(pp=3), replace(CPU, count=8), MODEL)


def test_pipeline_stages_on_a_cpu_are_compiled() -> None:
    assert make_plan(Bench(tp=2), CPU, MODEL).eager
    made = make_plan(Bench(pp=2), CPU, MODEL)
    assert (made.eager, made.workers) == (False, 2)
    assert " TP=1 PP=2 EAGER=0" in repeat_command(made)
    with pytest.raises(WorkspaceError, match=r"EAGER=1: .* PP=2 .*; leave out EAGER"):
        make_plan(Bench(pp=2, eager="1"), CPU, MODEL)
    with pytest.raises(WorkspaceError, match=r"PP=2 EXECUTOR=ray: on a CPU .* EXECUTOR=mp alone"):
        make_plan(Bench(pp=2, executor="ray"), CPU, MODEL)
    assert make_plan(Bench(pp=2, eager="1"), replace(GPU, count=2), MODEL).eager


def test_a_cluster_may_have_more_devices_and_proves_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    made = make_plan(Bench(tp=4, executor="ray"), CPU, MODEL)
    assert made.workers == 4
    assert " TP=4 EXECUTOR=ray " in repeat_command(made)
    assert Settings.model_validate(made, from_attributes=True).parallel == "TP 4, Ray"
    with pytest.raises(WorkspaceError, match="TP=4: this machine has 2 CPU cores"):
        make_plan(Bench(tp=4), CPU, MODEL)
    with pytest.raises(WorkspaceError, match="METRIC=serve and ENGINE=released cannot be proven"):
        make_plan(Bench(executor="ray", metric="serve", engine="released"), CPU, MODEL)


def test_defaults_fit_a_model_that_takes_few_tokens() -> None:
    short = replace(MODEL, config=MODEL.config.model_copy(update={"max_position_embeddings": 16}))
    made = make_plan(Bench(), CPU, short)
    assert made.input_len + made.output_len <= 16


def test_unknown_operations_and_backends_name_those_there_are() -> None:
    operations.check(operations.chosen(None, None), "cpu")
    operations.check(operations.chosen("rms_norm,gemm", None), "cpu")
    operations.check(operations.chosen("silu_and_mul", "reference"), "cpu")
    with pytest.raises(WorkspaceError, match=r"no such backend; usable here: .*reference"):
        operations.check(operations.chosen(None, "turbo"), "cpu")
    with pytest.raises(WorkspaceError, match=r"CUDA devices only; usable here: .*reference"):
        operations.check(operations.chosen("gemm.cublaslt", None), "cpu")
    with pytest.raises(WorkspaceError, match=r"OP=quant_expand: .* are: gemm, paged_att\w+, "):
        operations.check(operations.chosen("quant_expand", None), "cpu")


def test_only_what_implements_an_op_of_the_ir_enters_by_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(WorkspaceError, match=r"gemm implements no op of .*; there are: rms_norm$"):
        operations.ir_arguments({"gemm": None})
    monkeypatch.setattr(release, "tree", lambda: tmp_path)
    with pytest.raises(WorkspaceError, match=r"has no IR; leave it out$"):
        operations.ir_arguments({"rms_norm": None})


def test_attention_enters_a_release_with_its_registry_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    operations.check({"paged_attention": "reference"}, "cpu")
    monkeypatch.setattr(release, "tree", lambda: tmp_path)
    with pytest.raises(WorkspaceError, match=r"OP=paged_attention: .* cannot be replaced; leave"):
        operations.check({"paged_attention": None}, "cpu")


@pytest.mark.parametrize(
    ("op", "backend", "says"),
    [
        ("rms_norm,rms_norm.triton", None, "names rms_norm twice"),
        (" , ", None, "names no operation"),
        ("rms_norm,gemm", "triton", r"such as OP=rms_norm\.triton,gemm\.triton"),
        ("rms_norm.cupy", "triton", "BACKEND=triton beside OP=rms_norm.cupy"),
    ],
)
def test_what_op_cannot_say_is_one_line(op: str, backend: str | None, says: str) -> None:
    with pytest.raises(WorkspaceError, match=says):
        operations.chosen(op, backend)


def test_unknown_quantization_methods_name_those_there_are() -> None:
    check_quantization(None)
    check_quantization("sparse_6_8")
    with pytest.raises(WorkspaceError, match=r"no such method in .*; known: .*sparse_2_4, "):
        check_quantization("sparse_2_5")
    with pytest.raises(WorkspaceError, match=r"by the model's config.json; leave it out"):
        check_quantization("sparse")


def test_model_larger_than_memory_is_refused_before_the_engine_starts() -> None:
    sizes = {"hidden_size": 2**17, "intermediate_size": 2**19}
    huge = replace(MODEL, config=MODEL.config.model_copy(update=sizes))
    with pytest.raises(WorkspaceError, match="GiB of memory"):
        check_memory(sample(model=huge))
    check_memory(sample(model=huge, device=GPU))


def test_command_that_repeats_a_run_asks_for_the_same_run() -> None:
    layers = "*.mlp.*,lm_head"
    for made in (
        sample(rounds=3, backend="reference", layers=layers),
        sample(backend="triton", interpret=True),
        sample(op="rms_norm,gemm.reference", engine="released"),
        sample(op="rms_norm", backend="reference", way="ir"),
        sample(quantization="sparse_2_4", baseline="fp8"),
        sample(model=sparse_model(), baseline="int8"),
        sample(model=sparse_model(), baseline="bf16"),
    ):
        words = shlex.split(repeat_command(made))
        assert words[:2] == ["make", "bench"]
        given = dict(word.split("=", 1) for word in words[2:])
        assert make_plan(read(Bench, given), CPU, made.model) == made


def test_a_sparse_model_is_compared_with_its_own_weights_unless_asked_otherwise() -> None:
    for precision in ("int8", "fp8"):
        made = make_plan(Bench(), CPU, sparse_model(precision))
        assert (made.baseline, made.method) == (precision, "sparse")
        assert made.same_weights
        assert not made.lossy
    for wanted in ("bf16", "stock"):
        unquantized = make_plan(Bench(baseline=wanted), CPU, sparse_model())
        assert unquantized.baseline == "bf16"
        assert unquantized.lossy
        assert not unquantized.same_weights


def test_a_dense_8_bit_model_with_a_sparse_method_is_compared_with_itself() -> None:
    dense = sparse_model(quant_method="compressed-tensors", pattern=None)
    made = make_plan(Bench(quantization="sparse_2_4"), CPU, dense)
    assert (made.baseline, made.method) == ("int8", "sparse_2_4")
    assert not made.lossy
    without = make_plan(Bench(), CPU, dense)  # the custom GEMM, in what is not quantized
    assert (without.baseline, without.method, without.lossy) == ("stock", None, False)


def test_the_unquantized_model_has_two_names() -> None:
    for options in (Bench(), Bench(quantization="sparse_2_4")):
        plain, named = (make_plan(replace(options, baseline=b), CPU, MODEL) for b in (None, "bf16"))
        assert plain == named
        assert plain.baseline == "stock"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Bench(baseline="fp8"), r"are int8; use BASELINE=int8 .* or BASELINE=bf16$"),
        (Bench(baseline="pristine"), r"weights are sparse .*; leave out BASELINE=pristine$"),
        (Bench(backend="reference", layers="*"), r"\(2:4 int8\).*; leave out BACKEND and LAYERS$"),
        (Bench(quantization="sparse_2_4"), r"; leave out QUANTIZATION$"),
    ],
)
def test_what_a_sparse_model_cannot_be_asked_for_is_one_line(options: Bench, says: str) -> None:
    with pytest.raises(WorkspaceError, match=says):
        make_plan(options, CPU, sparse_model())


def test_a_baseline_that_no_method_of_vllm_is_says_how_to_get_one() -> None:
    with pytest.raises(WorkspaceError, match="make convert DTYPE=int8"):
        make_plan(Bench(quantization="sparse_2_4", baseline="int8"), CPU, MODEL)
    packed = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
    model = sparse_model(quant_method="compressed-tensors", sparsity_config=packed)
    with pytest.raises(WorkspaceError, match="not stored as dense 8-bit"):
        make_plan(Bench(), CPU, model)
    assert make_plan(Bench(baseline="bf16"), CPU, model).baseline == "bf16"


def test_inexact_products_of_a_cpu_are_a_distance_and_no_proof() -> None:
    old = replace(CPU, exact_int8=False)
    for device, precision, lossy in (
        (old, "int8", True),
        (old, "fp8", False),
        (CPU, "int8", False),
    ):
        made = make_plan(Bench(), device, sparse_model(precision))
        assert made.same_weights
        assert made.lossy is lossy


def test_only_a_triton_kernel_on_the_cpu_is_interpreted() -> None:
    asked = Bench(backend="triton", interpret=True)
    assert make_plan(asked, CPU, MODEL).interpret
    assert not make_plan(replace(asked, interpret=False), CPU, MODEL).interpret
    assert not make_plan(replace(asked, backend="reference"), CPU, MODEL).interpret
    assert not make_plan(replace(asked, backend=None), CPU, MODEL).interpret
    assert not make_plan(asked, GPU, MODEL).interpret


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
    local = replace(MODEL, folder=Path("/made"), name="c", requested_path=folder)
    line = repeat_command(sample(model=local, layers=f"*.{name}"))
    assert shlex.split(line)[:2] == ["make", "bench"]
    seen = subprocess.run(
        ["sh", "-c", line], cwd=tmp_path, env=clean_environment(), capture_output=True, check=True
    ).stdout
    assert seen.decode().split("\0") == [str(folder), f"*.{name}"]
