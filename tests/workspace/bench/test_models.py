# SPDX-License-Identifier: Apache-2.0
"""From MODEL to a folder: the order of places, the labels, one clear line when there is none."""

import http.server
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from tests.workspace.bench.samples import quantization_config
from tests.workspace.conftest import NOBODY
from workspace.bench import models, tiny_model
from workspace.host.errors import WorkspaceError

PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
}


@pytest.fixture(autouse=True)
def _empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests see neither the user's cache nor a network; the library read its settings at import.
    cache = str(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", cache)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("hub_id", list(models.catalogue()))
def test_catalogue_gives_the_published_parameter_count(hub_id: str) -> None:
    entry = models.catalogue()[hub_id]
    published = PUBLISHED[hub_id.removesuffix("-Instruct")]
    assert models.Config.model_validate(entry).parameters == published == entry["parameters"]


def test_catalogue_has_every_model_with_its_instruct_twin() -> None:
    assert set(models.catalogue()) == {
        name for hub_id in PUBLISHED for name in (hub_id, f"{hub_id}-Instruct")
    }


def test_offline_hub_id_in_the_catalogue_gets_dummy_weights_and_says_so(tmp_path: Path) -> None:
    model = models.resolve("Qwen/Qwen2.5-0.5B", "cpu", tmp_path / "models")
    assert model.weights == "dummy"
    assert model.weights_label == f"dummy weights (seed {models.DUMMY_SEED})"
    assert "HF_HUB_OFFLINE" in model.source
    config = json.loads((model.folder / "config.json").read_text())
    assert config["hidden_size"] == 896
    assert "parameters" not in config
    assert list(model.folder.glob("*.safetensors")) == []


@pytest.mark.parametrize("hub_id", ["Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.2-1B"])
def test_catalogue_configuration_loads_and_builds_a_model_of_that_size(
    hub_id: str, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = models.resolve(hub_id, "cpu", tmp_path)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model.folder))
    assert sum(p.numel() for p in built.parameters()) == PUBLISHED[hub_id]


def converted(folder: Path, source: str | None = None, name: str = "sparse") -> models.Model:
    """A converted model in `folder`, without weights unless there is a file."""
    config = {**tiny_model.CONFIG, "quantization_config": quantization_config(source=None)}
    if source:
        config["quantization_config"]["source"] = {"model": source}
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps(config))
    return models.resolve(str(folder / name), "cpu", folder / "models")


def test_a_converted_folder_says_how_its_weights_are_stored(tmp_path: Path) -> None:
    model = converted(tmp_path)
    assert model.weights == "dummy"
    assert model.pattern == "2:4"
    assert model.quantized is not None
    assert model.quantized.label == "2:4 int8"
    assert models.resolve("tiny-qwen2", "cpu", tmp_path / "models").pattern is None


def test_what_a_model_was_converted_from_is_beside_it_or_has_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(tiny_model.CONFIG))
    for source, name in (("base", "a"), ("Qwen/Qwen2.5-0.5B", "b")):
        model = converted(tmp_path, source, name)
        found = models.original(model, "cpu", tmp_path / "models")
        assert (found.name, found.weights) == (source, "dummy")


def test_an_unknown_or_missing_original_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="does not say what it was converted from"):
        models.original(converted(tmp_path), "cpu", tmp_path / "models")
    missing = converted(tmp_path, "lost", "missing")
    with pytest.raises(WorkspaceError, match="from lost, which is neither in") as error:
        models.original(missing, "cpu", tmp_path / "models")
    assert "\n" not in str(error.value)
    # Real weights on one side and drawn ones on the other would be compared with each other.
    drawn = converted(tmp_path, "tiny-qwen2", "drawn")
    with pytest.raises(WorkspaceError, match="put its weights into its folder"):
        models.original(drawn, "cpu", tmp_path / "models")


def test_generated_folder_is_made_once(tmp_path: Path) -> None:
    first = models.resolve("Qwen/Qwen2.5-0.5B", "cpu", tmp_path)
    stamp = (first.folder / "config.json").stat().st_mtime_ns
    again = models.resolve("Qwen/Qwen2.5-0.5B", "cpu", tmp_path)
    assert again.folder == first.folder
    assert (again.folder / "config.json").stat().st_mtime_ns == stamp


def test_without_a_name_the_cpu_gets_the_tiny_model_and_a_gpu_a_real_one(tmp_path: Path) -> None:
    assert models.resolve(None, "cpu", tmp_path).weights == "random"
    assert models.resolve(None, "cuda", tmp_path).name == "Qwen/Qwen2.5-0.5B"


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.6B", "no-such-model", "a/b/c", "../nowhere", " "])
def test_unknown_model_is_one_line_that_lists_what_there_is(name: str, tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError) as caught:
        models.resolve(name, "cpu", tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert f"MODEL={name}" in message
    assert all(known in message for known in ("tiny-qwen2", *PUBLISHED))


def test_local_folder_with_weights_is_real(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    tiny_model.write(folder)
    model = models.resolve(str(folder), "cpu", tmp_path / "models")
    assert (model.name, model.weights, model.folder) == ("mine", "real", folder)
    assert model.config.vocab_size == tiny_model.CONFIG["vocab_size"]


def test_local_folder_without_weights_is_dummy(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_model.CONFIG))
    model = models.resolve(str(folder), "cpu", tmp_path / "models")
    assert (model.weights, model.requested_path) == ("dummy", folder)
    assert (model.tokenizer / "tokenizer.json").is_file()


def index(folder: Path, name: str, *files: str) -> None:
    weight_map = {f"w{number}": file for number, file in enumerate(files)}
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


def lacks_a_shard(folder: Path) -> None:
    index(folder, "model.safetensors.index.json", "model.safetensors", "model-2.safetensors")


def lacks_all_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index(folder, "model.safetensors.index.json", "model-1.safetensors")


def lacks_a_shard_by_its_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def lacks_a_pickled_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index(folder, "pytorch_model.bin.index.json", "pytorch_model-1.bin")


def has_an_unreadable_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def is_cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def is_cut_off_in_its_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**20).to_bytes(8, "little") + b"{")


def is_empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def is_a_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "model.safetensors").write_text(text)


def is_a_link_to_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/0")


def is_a_cut_off_archive(folder: Path) -> None:
    import torch

    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"w": torch.zeros(9)}, path)
    path.write_bytes(path.read_bytes()[:-30])


def is_still_on_its_way(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    download = folder / ".cache" / "huggingface" / "download"
    download.mkdir(parents=True)
    (download / "model.safetensors.incomplete").write_bytes(b"x")


def has_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()  # its settings alone are none


def has_a_pointer_for_a_tokenizer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "tokenizer" / "tokenizer.json").write_text(text)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lacks_a_shard, "/model-2.safetensors is missing"),
        (lacks_all_shards, "/model-1.safetensors is missing"),
        (lacks_a_shard_by_its_name, "/model-00002-of-00002.safetensors is missing"),
        (lacks_a_pickled_shard, "/pytorch_model-1.bin is missing"),
        (has_an_unreadable_index, "/model.safetensors.index.json (KeyError"),
        (is_cut_off, "/model.safetensors is damaged or incomplete"),
        (is_cut_off_in_its_header, "/model.safetensors is damaged or incomplete"),
        (is_empty, "/model.safetensors is empty"),
        (is_a_pointer, "/model.safetensors is a Git LFS pointer"),
        (is_a_link_to_nothing, "/model.safetensors is a link to a missing file"),
        (is_a_cut_off_archive, "/pytorch_model.bin is damaged or incomplete"),
        (is_still_on_its_way, "/model.safetensors.incomplete"),
        (has_no_tokenizer, "weights and no tokenizer"),
        (has_a_pointer_for_a_tokenizer, "tokenizer.json is a Git LFS pointer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_with_a_part_of_a_model_is_refused_by_the_name_of_the_file(
    fault: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    tiny_model.write(folder)
    fault(folder)
    with pytest.raises(WorkspaceError) as caught:
        models.resolve(str(folder), "cpu", tmp_path / "models")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "models").exists()


def test_what_does_not_belong_to_the_weights_is_left_aside(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    tiny_model.write(folder)
    (folder / "optimizer.pt").write_bytes(b"")
    index(folder, "pytorch_model.bin.index.json", "pytorch_model-1.bin")  # the hub has both
    assert models.resolve(str(folder), "cpu", tmp_path / "models").weights == "real"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").unlink()
    assert models.resolve(str(folder), "cpu", tmp_path / "models").weights == "dummy"


def test_a_configuration_with_other_names_is_read_as_vllm_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    gpt2 = {"model_type": "gpt2", "n_embd": 96, "n_head": 6, "n_layer": 3, "n_positions": 512}
    (folder / "config.json").write_text(json.dumps(gpt2 | {"vocab_size": 300}))
    model = models.resolve(str(folder), "cpu", tmp_path / "models")
    assert (model.config.vocab_size, model.config.max_position_embeddings) == (300, 512)
    assert model.config.hidden_size == 96
    assert model.kv_bytes_per_token == 2 * 2 * 3 * 96
    # What the engine gets is the file as it was.
    assert json.loads((model.folder / "config.json").read_text())["n_embd"] == 96


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read"),
        ("{", "cannot read"),
        ("[]", "not an object"),
        ("{}", "vLLM cannot read"),
        ('{"model_type": "mamba"}', "lacks num_attention_heads"),
    ],
)
def test_local_folder_with_a_broken_configuration_is_one_line(
    content: str | None, says: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(WorkspaceError, match=says) as caught:
        models.resolve(str(tmp_path), "cpu")
    assert "\n" not in str(caught.value)


def test_whole_model_in_the_local_hub_cache_is_real(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "hub", "some/model")
    model = models.resolve("some/model", "cpu", tmp_path / "models")
    assert (model.weights, model.source) == ("real", "local hub cache")
    assert model.folder.samefile(snapshot)


def test_cache_with_a_part_of_the_weights_is_no_reason_for_dummy_ones(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "hub", "Qwen/Qwen2.5-0.5B")
    is_cut_off(snapshot)
    with pytest.raises(WorkspaceError, match=r"model\.safetensors is damaged.*HF_HUB_OFFLINE"):
        models.resolve("Qwen/Qwen2.5-0.5B", "cpu", tmp_path / "models")
    (snapshot / "model.safetensors").unlink()
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    (blobs / "0.incomplete").write_bytes(b"x")
    with pytest.raises(WorkspaceError, match=r"cut off .*/0\.incomplete.*HF_HUB_OFFLINE"):
        models.resolve("Qwen/Qwen2.5-0.5B", "cpu", tmp_path / "models")


def test_cache_without_the_weights_is_not_taken_for_whole(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "hub", "Qwen/Qwen2.5-0.5B")
    (snapshot / "model.safetensors").unlink()
    model = models.resolve("Qwen/Qwen2.5-0.5B", "cpu", tmp_path / "models")
    assert model.weights == "dummy"


@pytest.mark.parametrize(
    ("status", "headers", "says"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, "the hub does not have it"),
        (403, {"X-Error-Code": "GatedRepo"}, "licence"),
        (500, {}, "the hub answered 500"),
    ],
)
def test_what_the_hub_answers_is_in_the_message(
    status: int,
    headers: dict[str, str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with hub(status, headers) as address:
        point_at(address, monkeypatch)
        with pytest.raises(WorkspaceError, match=says):
            models.resolve("some/model", "cpu", tmp_path)


def test_a_hub_cache_that_cannot_be_written_does_not_pass_for_a_hub_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()  # nobody, not even root, can make a folder in it
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    headers = {"X-Repo-Commit": "0" * 40, "ETag": '"0"', "Content-Type": "application/json"}
    with hub(200, headers, ["config.json"]) as address:
        point_at(address, monkeypatch)
        with pytest.raises(WorkspaceError, match=r"/file\S* cannot be written .*set HF_HOME"):
            models.resolve("Qwen/Qwen2.5-0.5B", "cpu", tmp_path / "models")


def test_hub_out_of_reach_is_said_and_the_catalogue_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at(NOBODY, monkeypatch)
    with pytest.raises(WorkspaceError, match="not reachable"):
        models.resolve("some/model", "cpu", tmp_path)
    model = models.resolve("Qwen/Qwen2.5-0.5B", "cpu", tmp_path)
    assert "not reachable" in model.source


def cached(cache: Path, name: str) -> Path:
    """A snapshot as the hub's client keeps it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    tiny_model.write(snapshot)
    (snapshot / "tokenizer.json").write_bytes((snapshot / "tokenizer/tokenizer.json").read_bytes())
    return snapshot


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    files = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)


class hub:
    """A hub on loopback that answers every request with one status, and may list files."""

    def __init__(
        self, status: int, headers: dict[str, str], files: list[str] | None = None
    ) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                tree = [
                    {"type": "file", "path": name, "oid": "0", "size": 1} for name in files or ()
                ]
                answer = tree if "/tree/" in self.path else {"id": "x", "sha": "0" * 40}
                body = b"" if files is None else json.dumps(answer).encode()
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
