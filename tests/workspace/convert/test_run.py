# SPDX-License-Identifier: Apache-2.0
"""`make convert`: what it writes, what it refuses, and that nothing is lost on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_kernels.sparse_gemm import prune_weight, quantize_weight
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2Config, Qwen2ForCausalLM

from tests.language_model import CONFIG, LanguageModel, perplexity
from workspace import cli, verbs
from workspace.bench.checkpoint import dense_config
from workspace.convert import run as pipeline
from workspace.convert.checkpoint import INDEX
from workspace.convert.layer import TORCH
from workspace.convert.run import NORMS, Source
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT

Tensors = dict[str, torch.Tensor]


def convert(folder: Path, out: Path, **options: Any) -> Path:
    pipeline.run(
        verbs.Convert(out=str(out), **options),
        Source(folder.name, folder, folder, has_weights=True),
    )
    return out


def read(folder: Path) -> Tensors:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def write_shards(folder: Path, tensors: Tensors, count: int) -> None:
    """The same checkpoint in several files."""
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {one: tensors[one] for one in names[number::count]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def sharded(trained_model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model in three files, with files beside them that are not weights."""
    folder = tmp_path_factory.mktemp("sharded") / "sharded"
    shutil.copytree(trained_model.folder, folder)
    (folder / "model.safetensors").unlink()
    write_shards(folder, read(trained_model.folder), 3)
    (folder / "extra").mkdir()
    (folder / "extra" / "chat.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    return folder


@pytest.mark.parametrize(
    ("pattern", "dtype"), [("2:4", "fp8"), ("4:6", "int8"), ("6:8", "fp8"), ("mixed", "fp8")]
)
def test_each_linear_layer_is_pruned_and_quantized_by_the_definition(
    sharded: Path, tmp_path: Path, pattern: str, dtype: Any
) -> None:
    out = convert(sharded, tmp_path / "out", pattern=pattern, dtype=dtype)
    source, converted = read(sharded), read(out)
    report = json.loads((out / "convert.json").read_text())
    lost = whole = 0.0
    for name, tensor in source.items():
        found = converted.pop(name)
        if not is_linear(name):
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor), name
            continue
        values, scale = quantize_weight(prune_weight(tensor, pattern), TORCH[dtype])
        assert torch.equal(found.view(torch.uint8), values.view(torch.uint8)), name
        found_scale = converted.pop(f"{name}_scale")
        assert torch.equal(found_scale, scale.unsqueeze(1)), name
        difference = (values.double() * scale.unsqueeze(1) - tensor.double()).square().sum().item()
        layer = report["layers"][name.removesuffix(".weight")]["relative_error"]
        size = tensor.double().square().sum().item()
        assert layer == pytest.approx((difference / size) ** 0.5, rel=1e-4)
        lost, whole = lost + difference, whole + size
    assert converted == {}
    assert report["total"]["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)

    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    assert set(weight_map) == {
        *source,
        *(f"{name}_scale" for name in source if is_linear(name)),
    }
    assert {path.name for path in out.iterdir()} == {
        *(path.name for path in sharded.iterdir() if path.suffix != ".bin"),
        "convert.json",
    }
    assert (out / "extra" / "chat.jinja").read_text() == "{{ messages }}"
    described = config(out).pop("quantization_config")
    assert (described["pattern"], described["ignore"]) == (pattern, ["lm_head"])
    assert described["source"]["model"] == "sharded"
    assert str(tmp_path) not in (out / "config.json").read_text()
    assert {**config(out), "quantization_config": None} == {
        **config(sharded),
        "quantization_config": None,
    }


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_transformers_reads_the_same_files_as_a_dense_model(
    trained_model: LanguageModel, tmp_path: Path, dtype: Any
) -> None:
    out = convert(trained_model.folder, tmp_path / "out", dtype=dtype)
    ours = config(out)
    ours["quantization_config"] = dense_config(ours["quantization_config"])
    (out / "config.json").write_text(json.dumps(ours))
    dense = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)

    pruned = AutoModelForCausalLM.from_pretrained(trained_model.folder, dtype=torch.float32)
    for name, weight in pruned.named_parameters():
        if is_linear(name):
            weight.data = prune_weight(weight.data, "2:4")
    expected = perplexity(pruned, trained_model, 2048)
    assert perplexity(dense, trained_model, 2048) == pytest.approx(expected, rel=0.02)


def test_weights_that_have_the_pattern_are_kept(
    trained_model: LanguageModel, tmp_path: Path
) -> None:
    """A mask that is there, for example of a model that was trained with it, is the one used."""
    folder = tmp_path / "masked"
    shutil.copytree(trained_model.folder, folder)
    generator = torch.Generator().manual_seed(0)
    tensors = read(folder)
    for name, tensor in tensors.items():
        if is_linear(name):  # two weights of each group, whatever their size
            places = torch.rand(tensor.numel() // 4, 4, generator=generator).argsort(-1)
            tensor.mul_((places < 2).view_as(tensor))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    out = convert(folder, tmp_path / "out")
    for name, tensor in read(out).items():
        if is_linear(name):
            assert not (tensor.float() != 0)[tensors[name] == 0].any(), name
    total = json.loads((out / "convert.json").read_text())["total"]
    assert total["relative_error"] < 0.04  # what quantization to fp8 alone costs


def test_norms_of_a_text_lower_the_weighted_error_and_can_be_used_again(
    trained_model: LanguageModel, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(trained_model.training.read_text()[:10_000])
    magnitude = convert(trained_model.folder, tmp_path / "magnitude")
    wanda = convert(trained_model.folder, tmp_path / "wanda", calibrate=str(text))
    norms = load_file(wanda / NORMS)
    again = convert(trained_model.folder, tmp_path / "again", scores=str(wanda / NORMS))
    assert config(again)["quantization_config"]["source"]["scores"] == NORMS.name
    assert files(again)["model.safetensors"] == files(wanda)["model.safetensors"]
    assert files(again)["model.safetensors"] != files(magnitude)["model.safetensors"]

    layers = json.loads((wanda / "convert.json").read_text())["layers"]
    source, by_magnitude = read(trained_model.folder), read(magnitude)
    for name, found in layers.items():
        weight = source[f"{name}.weight"].float()
        kept = by_magnitude[f"{name}.weight"].float() * by_magnitude[f"{name}.weight_scale"]
        lost, whole = ((kept - weight) * norms[name]).norm(), (weight * norms[name]).norm()
        assert found["weighted_error"] < (lost / whole).item(), name
    # q, k and v see the same input; that of the first layer is the normalized embedding.
    first = "model.layers.0.self_attn"
    assert torch.equal(norms[f"{first}.q_proj"], norms[f"{first}.v_proj"])


class Stopped(BaseException):
    """Like a kill, nothing handles it."""


@contextmanager
def stopping_at(monkeypatch: pytest.MonkeyPatch, save: int) -> Iterator[None]:
    """End the conversion at the n-th file that is saved."""
    saved = 0

    def stop(*arguments: Any) -> Any:
        nonlocal saved
        saved += 1
        if saved == save:
            raise Stopped
        return original(*arguments)

    original = pipeline._convert_shard
    with monkeypatch.context() as patch, pytest.raises(Stopped):  # noqa: PT012
        patch.setattr(pipeline, "_convert_shard", stop)
        yield


KILLED = """
import os, signal, sys
from pathlib import Path
from workspace import verbs
from workspace.convert import run as pipeline

folder, out, count, moment = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
replace, written = Path.replace, 0

def dies(partial, path):
    global written
    written += path.suffix == ".safetensors"
    if written == count:
        if moment == "written":
            replace(partial, path)
        else:
            os.truncate(partial, partial.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(partial, path)

Path.replace = dies
pipeline.run(verbs.Convert(out=out), pipeline.Source(folder.name, folder, folder, True))
"""


@pytest.mark.slow
def test_after_a_kill_it_goes_on_and_writes_the_same_bytes(
    sharded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for count, moment in ((2, "writing"), (1, "written")):  # twice at the second file
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(sharded), str(out), str(count), moment],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL
        assert not out.exists()
    first = tmp_path / "out.unfinished" / "model-00001-of-00003.safetensors"
    written = first.stat().st_mtime_ns
    capfd.readouterr()
    convert(sharded, out)
    assert "going on after 1 finished file" in capfd.readouterr().err
    assert (out / first.name).stat().st_mtime_ns == written
    assert files(out) == files(convert(sharded, tmp_path / "whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_what_is_left_of_other_options_or_weights_is_not_mixed_in(
    sharded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "source"
    shutil.copytree(sharded, source)
    out = tmp_path / "out"
    with stopping_at(monkeypatch, 3):
        convert(source, out, pattern="6:8")
    with stopping_at(monkeypatch, 2):  # another pattern
        convert(source, out)
    assert "starting anew" in capfd.readouterr().err
    for path in source.glob("*.safetensors"):  # other weights in files of the same names and sizes
        save_file({k: v.neg() for k, v in load_file(path).items()}, path, {"format": "pt"})
    convert(source, out)
    assert "starting anew" in capfd.readouterr().err
    assert files(out) == files(convert(source, tmp_path / "whole"))


def test_a_model_that_is_there_is_replaced_only_when_asked_and_only_by_a_whole_one(
    trained_model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = convert(trained_model.folder, tmp_path / "out", pattern="6:8")
    before = files(out)
    with pytest.raises(WorkspaceError, match="exists; FORCE=1"):
        convert(trained_model.folder, out)
    with stopping_at(monkeypatch, 1):
        convert(trained_model.folder, out, force=True)
    assert files(out) == before
    convert(trained_model.folder, out, force=True)
    assert config(out)["quantization_config"]["pattern"] == "2:4"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_other_folder_is_replaced(trained_model: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    with pytest.raises(WorkspaceError, match="is not a model"):
        convert(trained_model.folder, tmp_path / "thesis", force=True)
    for out in (trained_model.folder / "out", trained_model.folder, trained_model.folder.parent):
        with pytest.raises(WorkspaceError, match="lie in each other"):
            convert(trained_model.folder, out, force=True)
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "chapter-1").touch()
    with pytest.raises(WorkspaceError, match="did not write"):
        convert(trained_model.folder, tmp_path / "out")
    assert (tmp_path / "out.unfinished" / "chapter-1").exists()


def test_a_second_process_at_the_same_folder_is_refused(
    trained_model: LanguageModel, tmp_path: Path
) -> None:
    with (
        pipeline.place.unfinished(tmp_path / "out"),
        pytest.raises(WorkspaceError, match="another make convert is writing"),
    ):
        convert(trained_model.folder, tmp_path / "out")


def test_a_full_disk_is_one_clear_error_and_it_goes_on_after(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        with pytest.raises(WorkspaceError, match=r"the converted weights take 0\.0 GB"):
            convert(sharded, place / "out")
        with monkeypatch.context() as patch:  # another process takes the space meanwhile
            patch.setattr(pipeline.place, "check_space", lambda *_: None)
            with pytest.raises(WorkspaceError, match=r"cannot write .* space left") as caught:
                convert(sharded, place / "out")
        assert "\n" not in str(caught.value)
        subprocess.run(["mount", "-o", "remount,size=9m", str(place)], check=True)
        assert files(convert(sharded, place / "out")) == files(convert(sharded, tmp_path / "out"))
    finally:
        subprocess.run(["umount", str(place)], check=True)


# --- what is refused ------------------------------------------------------------------------------


def _change_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({**config(folder), **values}))

    return change


def _change_tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = read(folder)
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return write


def _become_mixtral(folder: Path) -> None:
    MixtralConfig.from_dict(CONFIG | {"num_local_experts": 2}).save_pretrained(folder)


def _copy_shard(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")


UP = "model.layers.1.mlp.up_proj"
REFUSED: list[tuple[str, Callable[[Path], None], dict[str, Any], str]] = [
    (
        "quantized",
        _change_config(quantization_config={"quant_method": "awq"}),
        {},
        r"is quantized already \(awq\)",
    ),
    (
        "8-bit weights",
        _change_tensors(lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].to(torch.int8)})),
        {},
        rf"{UP} has weights of torch.int8",
    ),
    ("unknown", _change_config(model_type="brandnew"), {}, "cannot build its architecture"),
    (
        "remote code",
        _change_config(model_type="brandnew", auto_map={"AutoConfig": "code.Config"}),
        {},
        "cannot build its architecture",
    ),
    ("experts", _become_mixtral, {}, r"experts\S* is no linear layer that can"),
    (
        "another head",
        _change_tensors(lambda t: t.update({"mtp.fc.weight": torch.zeros(8, 8)})),
        {},
        r"mtp\.fc is no linear layer that can",
    ),
    (
        "a missing layer",
        _change_tensors(lambda t: t.pop(f"{UP}.weight")),
        {},
        f"{UP} has no weight in the checkpoint",
    ),
    (
        "another shape",
        _change_config(intermediate_size=408),
        {},
        r"gate_proj has a weight \[384, 192\]|down_proj has a weight \[192, 384\]",
    ),
    (
        "not finite",
        _change_tensors(lambda t: t[f"{UP}.weight"][3, 5].fill_(torch.nan)),
        {},
        f"{UP} has weights that are not finite",
    ),
    ("short rows", _change_config(hidden_size=18), {"pattern": "28:30"}, "has K=18, less than"),
    ("pattern", _change_config(), {"pattern": "1:2"}, "PATTERN: 1:2 is not a pattern"),
    ("pickles", lambda folder: (folder / "model.safetensors").unlink(), {}, "not in safetensors"),
    ("two copies", _copy_shard, {}, r"is in consolidated\.safetensors and in model\.safetensors"),
    (
        "cut off",
        lambda folder: os.truncate(folder / "model.safetensors", 999),
        {},
        "cannot be read",
    ),
    ("no scores", _change_config(), {"scores": "missing"}, "missing: cannot be read"),
    ("no text", _change_config(), {"calibrate": "missing"}, "missing: cannot be read"),
]


@pytest.mark.parametrize(
    ("change", "options", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_what_cannot_be_converted_is_refused_by_name(
    trained_model: LanguageModel,
    tmp_path: Path,
    change: Callable[[Path], None],
    options: dict[str, Any],
    message: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(trained_model.folder, folder)
    change(folder)
    with pytest.raises(WorkspaceError, match=message) as caught:
        convert(folder, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        (torch.ones(191), rf"{UP} needs norms \[192\], and it has \[191\]"),
        (None, rf"{UP} needs norms \[192\], and it has nothing"),
        (torch.full((192,), -1.0), f"{UP} has norms that are negative or not finite"),
    ],
)
def test_scores_that_do_not_fit_are_refused_by_layer(
    trained_model: LanguageModel, tmp_path: Path, norms: torch.Tensor | None, message: str
) -> None:
    source = read(trained_model.folder)
    scores = {
        name.removesuffix(".weight"): torch.ones(tensor.shape[1])
        for name, tensor in source.items()
        if is_linear(name)
    }
    scores.pop(UP)
    if norms is not None:
        scores[UP] = norms
    save_file(scores, tmp_path / "scores.safetensors")
    with pytest.raises(WorkspaceError, match=message):
        convert(trained_model.folder, tmp_path / "out", scores=str(tmp_path / "scores.safetensors"))


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(WorkspaceError, match="exclude each other"):
        verbs.Convert(scores="a", calibrate="b")
    with pytest.raises(WorkspaceError, match="name the folder to write"):
        pipeline.run(verbs.Convert(), Source("m", Path(), Path(), has_weights=True))


# --- without weights ------------------------------------------------------------------------------


@pytest.fixture
def _nothing_to_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.set_up, "package_only", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("_nothing_to_set_up")
def test_dummy_writes_configuration_and_tokenizer_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = "Qwen/Qwen2.5-7B"
    with pytest.raises(WorkspaceError, match="has no weights here; DUMMY=1"):
        cli.convert(verbs.Convert(model=model, out=str(out)))
    cli.convert(verbs.Convert(model=model, out=str(out), pattern="6:8", dummy=True))
    described = config(out)["quantization_config"]
    assert (described["pattern"], described["source"]["model"]) == ("6:8", model)
    assert config(out)["hidden_size"] == 3584
    assert (out / "tokenizer" / "tokenizer.json").is_file()
    assert not list(out.rglob("*.safetensors"))


# --- memory ---------------------------------------------------------------------------------------

MEMORY = """
import os, resource, sys
from pathlib import Path
from workspace import verbs
from workspace.convert.run import Source, run

def convert(folder):
    out = str(folder.with_name(f"{folder.name}-out"))
    run(verbs.Convert(out=out), Source(folder.name, folder, folder, True))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # each thread needs some, too
small, large = map(Path, sys.argv[1:])
before = convert(small)  # with all that is imported
print(convert(large) - before)
"""


@pytest.mark.slow
def test_memory_stays_below_twice_the_largest_file(
    trained_model: LanguageModel, tmp_path: Path
) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    shutil.copytree(trained_model.folder, small)
    sizes = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 2}
    network = Qwen2ForCausalLM(Qwen2Config.from_dict(CONFIG | sizes)).bfloat16()
    network.config.save_pretrained(large)
    write_shards(large, network.state_dict(), 2)
    largest = max(path.stat().st_size for path in large.glob("*.safetensors"))
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(small), str(large)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert int(ran.stdout.splitlines()[-1]) < 2 * largest
