# SPDX-License-Identifier: Apache-2.0
"""What `make eval` compares with what, on which tokens."""

import json
import shlex
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from tests.language_model import LanguageModel
from tests.workspace.bench import sparse_folder
from workspace.bench import workload
from workspace.bench.plan import Device
from workspace.eval import plan, report, text
from workspace.eval.plan import prepare
from workspace.host.errors import WorkspaceError
from workspace.host.options import read
from workspace.verbs import Eval

CPU = Device("cpu", 2, "a CPU")
GPU = Device("cuda", 2, "a GPU")


@pytest.fixture(scope="module")
def sparse(trained_model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model, beside the one that it was made from."""
    here = tmp_path_factory.mktemp("models")
    shutil.copytree(trained_model.folder, here / trained_model.folder.name)
    return sparse_folder.write(trained_model.folder, here / "sparse", "int8")


def test_a_sparse_model_is_compared_with_its_source(sparse: Path) -> None:
    made = prepare(Eval(str(sparse)), CPU)
    assert made.model.model.folder == sparse
    assert made.against.model.folder == sparse.parent / "trained-qwen2"
    assert (made.model.quantized, made.against.quantized) == ("2:4 int8", None)
    assert (made.model.variant.launches, made.against.variant.launches) == (True, False)
    assert not made.same_weights


def test_and_with_its_own_weights_as_dense_ones(sparse: Path) -> None:
    made = prepare(Eval(str(sparse), against="int8"), CPU)
    assert made.same_weights
    assert made.against.model.folder == made.model.model.folder == sparse
    assert made.against.quantized == "int8, dense"
    assert made.against.variant.arguments[0] == "--hf-overrides"


def test_and_with_another_sparse_model(sparse: Path) -> None:
    made = prepare(Eval(str(sparse), against=str(sparse)), CPU)
    assert made.against.quantized == made.model.quantized == "2:4 int8"
    assert made.against.variant.launches
    assert not made.same_weights


def test_a_method_is_compared_with_the_unquantized_model(trained_model: LanguageModel) -> None:
    folder = str(trained_model.folder)
    made = prepare(Eval(folder, quantization="sparse_2_4"), CPU)
    assert (made.model.quantized, made.against.quantized) == ("sparse_2_4", None)
    assert not made.against.variant.launches
    online = prepare(Eval(folder, quantization="sparse_2_4", against="fp8"), CPU)
    assert online.against.quantized == "fp8"
    dense = prepare(Eval(folder, against=folder), CPU)
    assert not dense.model.variant.launches
    assert not dense.model.variant.switches  # vLLM's own kernels, not the custom GEMM


def test_the_command_repeats_it(sparse: Path, trained_model: LanguageModel) -> None:
    asked = Eval(str(sparse), text_file=str(trained_model.held_out), tokens=600, against="int8")
    made = prepare(asked, CPU)
    words = shlex.split(made.command)
    assert words[:2] == ["make", "eval"]
    assert prepare(read(Eval, dict(word.split("=", 1) for word in words[2:])), CPU) == made


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Eval("tiny-qwen2", quantization="sparse_2_4"), "random weights, which have no quality"),
        (Eval("Qwen/Qwen2.5-0.5B", quantization="sparse_2_4"), "dummy weights, which have no"),
        (Eval("TRAINED"), "it is not sparse, so it has no dense model of its own"),
        (Eval("TRAINED", against="int8"), "it is not sparse, so it has no dense model of its own"),
        (Eval("TRAINED", against="tiny-qwen2"), "AGAINST=tiny-qwen2: it has random weights"),
        (Eval("SPARSE", against="no/such"), "^AGAINST=no/such: no such folder"),
        (Eval("SPARSE", against="fp8"), "are int8; use AGAINST=int8, or name a model"),
        (Eval("SPARSE", quantization="sparse_2_4"), "leave out QUANTIZATION"),
        (
            Eval("SPARSE", text_file="no/such/file"),
            "cannot be read .No such file or directory.; pa",
        ),
        (Eval("SPARSE", text_file="SPARSE/model.safetensors"), "it is not text in UTF-8"),
        (Eval("SPARSE", text_file="SPARSE/config.json", tokens=100), "it has 100 tokens, of which"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    options: Eval,
    says: str,
    sparse: Path,
    trained_model: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    known = {"TRAINED": str(trained_model.folder), "SPARSE": str(sparse)}

    def place(value: str | None) -> str | None:
        first, slash, rest = (value or "").partition("/")
        return known[first] + slash + rest if first in known else value

    asked = replace(
        options,
        model=place(options.model),
        text_file=place(options.text_file),
        against=place(options.against),
    )
    with pytest.raises(WorkspaceError, match=says) as caught:
        prepare(asked, CPU)
    assert "\n" not in str(caught.value)


def test_models_that_see_other_tokens_are_not_compared(sparse: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(sparse, other)
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    vocabulary["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(WorkspaceError, match="other and sparse have different tokenizers"):
        prepare(Eval(str(sparse), against=str(other)), CPU)


def test_windows_are_those_of_the_device_and_fit_the_model(sparse: Path) -> None:
    on_cpu, on_gpu = (prepare(Eval(str(sparse), tokens=2000), one) for one in (CPU, GPU))
    assert [len(window) for window in on_cpu.windows] == [512, 512, 512, 464]
    assert [len(window) for window in on_gpu.windows] == [1023, 977]  # it has 1024 positions
    assert list(chain(*on_cpu.windows)) == list(chain(*on_gpu.windows))
    assert (on_cpu.steps, on_gpu.steps) == (4, 1)
    assert on_gpu.seconds is None


def test_each_window_begins_as_the_tokenizer_begins_a_text() -> None:
    assert text.windows([1, 2, 3, 4, 5], [], 2) == [[1, 2], [3, 4]]
    assert text.windows([1, 2, 3, 4, 5], [9], 3) == [[9, 1, 2], [9, 3, 4], [9, 5]]


def test_a_slow_machine_scores_fewer_tokens_by_itself(
    sparse: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = prepare(Eval(str(sparse)), CPU)
    assert fast.tokens == plan.SIZES["cpu"].tokens
    slow = workload.Speed(import_s=3.0, draw_s=0.0, product_s={1: 1e-5, 64: 1e-5})
    monkeypatch.setattr(workload, "speed_of", lambda _: slow)
    slower = prepare(Eval(str(sparse)), CPU)
    assert text.FEWEST_TOKENS <= slower.tokens < fast.tokens
    assert slower.seconds is not None
    assert prepare(Eval(str(sparse), tokens=2000), CPU).tokens == 2000
    report.announce(slower)
    printed = capsys.readouterr().out
    assert "sparse (2:4 int8) against trained-qwen2 (unquantized)" in printed
    assert f"{slower.tokens:,} tokens of the manual of Python 3." in printed
