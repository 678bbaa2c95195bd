# SPDX-License-Identifier: Apache-2.0
"""What each side is started with: the same but for its switches, and what vLLM really counts."""

import json
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.workspace.bench.samples import plan, sparse_model
from workspace.bench import operations, variants
from workspace.bench.plan import Device
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT

LOG = Path("log")
STOCK = variants.Variant("stock")


def test_sides_differ_in_nothing_but_the_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(operations.GEMM_SWITCH, "1")
    monkeypatch.setenv(operations.GEMM_BACKEND, "something")
    monkeypatch.setenv(operations.GEMM_LAYERS, "*")
    made = plan(backend="reference", layers="lm_head")
    stock, custom = (variants.environment(made, v, LOG) for v in variants.stock_and_custom(made))
    assert custom.items() - stock.items() == {
        (operations.GEMM_SWITCH, "1"),
        (operations.GEMM_BACKEND, "reference"),
        (operations.GEMM_LAYERS, "lm_head"),
    }
    assert stock.items() <= custom.items()


def test_layer_operations_have_switches_of_their_own() -> None:
    two = plan(op="rms_norm,silu_and_mul.reference", layers="*.mlp.*")
    assert variants.custom(two).switches == {
        operations.OPS_SWITCH: "rms_norm,silu_and_mul.reference",
        operations.OPS_LAYERS: "*.mlp.*",
    }
    with_gemm = plan(op="gemm,rms_norm")
    assert variants.custom(with_gemm).switches == {
        operations.OPS_SWITCH: "rms_norm", operations.GEMM_SWITCH: "1",
    }  # fmt: skip
    one = plan(op="rms_norm", backend="triton")
    assert variants.custom(one).switches == {operations.OPS_SWITCH: "rms_norm.triton"}


def test_an_op_of_vllms_ir_is_chosen_by_vllms_own_setting() -> None:
    variant = variants.custom(plan(op="rms_norm", backend="reference", way="ir"))
    assert variant.switches == {}
    option, value = variant.arguments
    assert option == "--ir-op-priority"
    assert json.loads(value) == {
        "rms_norm": ["custom_kernels_reference"],
        "fused_add_rms_norm": ["custom_kernels_reference"],
    }


def test_attention_is_a_switch_and_on_a_gpu_vllms_name_for_a_backend_from_outside() -> None:
    gpu = Device("cuda", 1, "NVIDIA H100")
    for device, given in [(plan().device, ()), (gpu, ("--attention-backend", "CUSTOM"))]:
        made = plan(op="rms_norm,paged_attention.triton", layers="*.0.*", device=device)
        stock, custom = variants.stock_and_custom(made)
        assert custom.switches == {
            "VLLM_CUSTOM_OPS": "rms_norm,paged_attention.triton",
            "VLLM_CUSTOM_OPS_LAYERS": "*.0.*",
        }
        assert (stock.arguments, custom.arguments) == ((), given)
        # Either tells which of vLLM's backends it has.
        told = variants.engine_arguments(made, stock)
        assert "workspace.bench.worker.WorkerExtension" in told
        assert variants.engine_arguments(made, custom) == [*told, *given]
    assert "--worker-extension-cls" not in variants.engine_arguments(plan(), custom)


def test_a_quantization_method_is_an_argument_and_no_switch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(operations.GEMM_SWITCH, "1")
    made = plan(quantization="sparse_6_8")
    sides = variants.stock_and_custom(made)
    stock, custom = (variants.environment(made, side, LOG) for side in sides)
    assert stock == custom
    assert operations.GEMM_SWITCH not in custom
    plain, quantized = (variants.arguments(made, side) for side in sides)
    assert quantized == [*plain, "--quantization", "sparse_6_8"]
    assert variants.command_line(made, sides[1]).endswith("--quantization sparse_6_8")


@pytest.mark.parametrize("quantization", ["sparse_2_4", None])
def test_vllms_own_fp8_is_a_baseline_for_every_custom_variant(quantization: str | None) -> None:
    made = plan(quantization=quantization, baseline="fp8")
    baseline, custom = variants.stock_and_custom(made)
    assert (baseline.name, baseline.launches, baseline.switches) == ("fp8", False, {})
    assert variants.arguments(made, baseline)[-2:] == ["--quantization", "fp8"]
    assert custom == variants.stock_and_custom(plan(quantization=quantization))[1]
    assert made.lossy


def test_a_sparse_model_needs_no_argument_and_its_baseline_has_the_same_files() -> None:
    made = plan(model=sparse_model(), baseline="int8")
    baseline, custom = variants.stock_and_custom(made)
    dense, sparse = (variants.arguments(made, side) for side in (baseline, custom))
    assert variants.environment(made, baseline, LOG) == variants.environment(made, custom, LOG)
    assert (baseline.name, baseline.launches, custom.launches) == ("int8", False, True)
    assert dense[:-2] == sparse
    assert dense[-2] == "--hf-overrides"
    assert made.model.quantized is not None
    assert json.loads(dense[-1]) == {"quantization_config": made.model.quantized.dense}


def test_the_unquantized_model_is_loaded_from_its_own_folder() -> None:
    original = replace(plan().model, folder=Path("o"))
    made = plan(model=replace(sparse_model(), converted_from=original), baseline="bf16")
    sides = variants.stock_and_custom(made)
    baseline, custom = (variants.arguments(made, side) for side in sides)
    assert [side.name for side in sides] == ["bf16", "custom"]
    assert baseline[baseline.index("--model") + 1] == "o"
    assert custom[custom.index("--model") + 1] == "m"
    assert not sides[0].arguments


def test_both_sides_draw_dummy_weights_with_the_pattern() -> None:
    made = plan(model=replace(sparse_model(), weights="dummy"), baseline="int8")
    for side in variants.stock_and_custom(made):
        words = variants.arguments(made, side)
        options = json.loads(words[words.index("--model-loader-extra-config") + 1])
        assert options == {"pattern": "2:4"}


def test_without_a_backend_the_kernels_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(operations.GEMM_BACKEND, "something")
    _, custom = variants.stock_and_custom(plan())
    assert operations.GEMM_BACKEND not in variants.environment(plan(), custom, LOG)


@pytest.mark.parametrize("interpret", [True, False])
def test_only_the_custom_variant_runs_in_tritons_interpreter(
    interpret: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    made = plan(backend="triton", interpret=interpret)
    stock, custom = (variants.environment(made, v, LOG) for v in variants.stock_and_custom(made))
    assert "TRITON_INTERPRET" not in stock  # vLLM's own kernels would run in it
    assert ("TRITON_INTERPRET" in custom) is interpret


def test_settings_that_keep_an_engine_from_its_work_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    variants.check_surroundings()
    for plugins in ("other,custom_kernels", variants.PLUGIN):
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
        variants.check_surroundings()
    for plugins in ("other", ""):
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
        with pytest.raises(WorkspaceError, match="add custom_kernels to it"):
            variants.check_surroundings()
    monkeypatch.delenv("VLLM_PLUGINS")
    (tmp_path / "file").touch()  # nobody, not even root, can make a folder in it
    for variable in ("HOME", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT"):
        with monkeypatch.context() as changed:
            changed.setenv(variable, str(tmp_path / "file"))
            with pytest.raises(WorkspaceError, match=r"/file\S* cannot be written .*; set HOME"):
                variants.check_surroundings()


def test_our_plugin_has_the_name_by_which_it_is_missed() -> None:
    names = {entry.name for entry in entry_points(group="vllm.general_plugins")}
    assert variants.PLUGIN in names


@pytest.mark.parametrize(
    ("reads", "counts", "other"),
    [
        ('getattr(args, "random_input_len", None)', "--random-", "--"),
        ('"input_len": args.input_len', "--", "--random-"),
    ],
)
def test_throughput_lengths_are_the_ones_that_the_release_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: str, counts: str, other: str
) -> None:
    source = tmp_path / "vllm" / "benchmarks" / "throughput.py"
    source.parent.mkdir(parents=True)
    source.write_text(reads)
    monkeypatch.setattr(variants, "tree", lambda: tmp_path)
    words = variants.arguments(plan(), STOCK)
    assert words[words.index(f"{counts}input-len") + 1] == "8"
    assert words[words.index(f"{counts}output-len") + 1] == "4"
    assert f"{other}input-len" not in words


def test_latency_takes_one_batch_of_all_prompts() -> None:
    words = variants.arguments(plan(metric="latency"), STOCK)
    assert words[words.index("--batch-size") + 1] == "3"
    assert words[words.index("--input-len") + 1] == "8"


@pytest.mark.parametrize("metric", ["throughput", "latency"])
def test_prompts_seen_before_are_not_cheaper(metric: str) -> None:
    assert "--no-enable-prefix-caching" in variants.arguments(plan(metric=metric), STOCK)


def test_dummy_weights_are_asked_for_by_our_load_format() -> None:
    dummy = plan(model=replace(plan().model, weights="dummy"))
    assert "--load-format" in variants.arguments(dummy, STOCK)
    assert "--load-format" not in variants.arguments(plan(), STOCK)


def test_eager_follows_the_plan() -> None:
    assert "--enforce-eager" in variants.arguments(plan(eager=True), STOCK)
    assert "--enforce-eager" not in variants.arguments(plan(eager=False), STOCK)


def test_another_tree_goes_first_on_the_module_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "mine")
    side = variants.Variant("pristine", python_path=Path("tree"))
    assert variants.environment(plan(), side, LOG)["PYTHONPATH"] == "tree:mine"


@pytest.mark.parametrize(
    ("cores", "workers", "expected"),
    [({0, 1}, 2, "0|1"), ({0, 1, 2, 3}, 2, "0,1|2,3"), ({4, 6, 8}, 2, "4|6"), ({3}, 1, "3")],
)
def test_workers_get_cores_of_their_own(
    cores: set[int], workers: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: cores)
    assert variants.bind_threads(workers) == expected


def test_length_limit_has_room_and_never_exceeds_the_model() -> None:
    assert variants.max_model_len(plan()) == 128
    real = replace(plan().model, weights="real")  # whose prompts may get longer by a few tokens
    whole = plan(model=real, input_len=64, output_len=64)
    assert variants.max_model_len(whole) == 256
    assert variants.max_model_len(plan(input_len=128, output_len=1)) == 256
    short = replace(
        plan().model, config=plan().model.config.model_copy(update={"max_position_embeddings": 40})
    )
    assert variants.max_model_len(plan(model=short)) == 40


@pytest.mark.parametrize(
    ("changes", "limits"),
    [
        ({}, (8, 128)),
        ({"num_prompts": 64, "input_len": 64}, (64, 4096)),
        ({"num_prompts": 1000, "input_len": 64}, (256, 4096)),
        ({"num_prompts": 1, "input_len": 300}, (8, 384)),
    ],
)
def test_limits_on_the_cpu_are_those_of_vllm_or_what_the_run_can_use(
    changes: dict[str, int], limits: tuple[int, int]
) -> None:
    assert variants.batch_limits(plan(**changes)) == limits


def test_a_gpu_gets_none_of_the_settings_for_the_cpu() -> None:
    on_gpu = plan(device=Device("cuda", 1, "a GPU"))
    assert "--max-num-seqs" not in variants.arguments(on_gpu, STOCK)
    settings = variants.common_settings(on_gpu)
    assert not [name for name in settings if "CPU" in name or "MULTIPROCESSING" in name]


def test_the_recorded_command_names_no_folder_of_this_machine() -> None:
    model = replace(plan().model, folder=ROOT / ".workspace/models/x", tokenizer=ROOT / "tokens")
    line = variants.command_line(plan(model=model), variants.Variant("stock"))
    assert "--model .workspace/models/x --tokenizer tokens" in line
    assert str(ROOT) not in line


def test_ray_is_vllms_own_executor_and_is_alone_unless_a_cluster_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    gpus = Device("cuda", 4, "NVIDIA H200")
    made = plan(device=gpus, executor="ray", tensor_parallel=2, pipeline_parallel=2)
    given = variants.arguments(made, variants.custom(made))
    for option, value in (
        ("--tensor-parallel-size", "2"),
        ("--pipeline-parallel-size", "2"),
        ("--distributed-executor-backend", "ray"),
        ("--worker-extension-cls", "workspace.bench.worker.WorkerExtension"),  # it counts
    ):
        assert given[given.index(option) + 1] == value
    assert variants.common_settings(made).items() >= variants.RAY_ALONE.items()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    settings = variants.common_settings(made)
    assert settings["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert settings.keys() & variants.RAY_ALONE.keys() == {"RAY_ADDRESS"}
