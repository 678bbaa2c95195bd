# SPDX-License-Identifier: Apache-2.0
"""From MODEL to a folder that vLLM can load, and whether its weights are real.

In this order: a local folder, the hub's local cache, the hub, the catalogue of architectures
(dummy weights). Without MODEL: the bundled tiny model on the CPU, Qwen2.5-0.5B on a GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from workspace.bench import checkpoint, synthetic_tokenizer, tiny_model, weights
from workspace.bench.checkpoint import Quantized
from workspace.bench.record import ModelRecord, Weights
from workspace.host.errors import WorkspaceError
from workspace.host.files import new_folder
from workspace.host.paths import STATE

GPU_DEFAULT = "Qwen/Qwen2.5-0.5B"
TINY = "tiny-qwen2"
MODELS = STATE / "models"
CATALOGUE = Path(__file__).with_name("catalogue.toml")
DUMMY_FORMAT = "scaled_dummy"
"""The load format that workspace.bench.dummy_weights registers."""
DUMMY_SEED = 20252
PROBE_SECONDS = 5.0
"""How long the hub may take to answer before it counts as not reachable."""
FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
"""What is fetched of a model: configuration, tokenizer, safetensors weights."""
TOKENIZERS = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


JsonObject = dict[str, JsonValue]


class Config(BaseModel):
    """What is read of a configuration, by transformers' names; GPT-2's file has n_embd instead."""

    model_config = ConfigDict(frozen=True)

    model_type: str = ""
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    intermediate_size: int = 0
    head_dim: int | None = None
    max_position_embeddings: int = 2**31
    attention_bias: bool | None = None
    tie_word_embeddings: bool = False
    torch_dtype: str = "bfloat16"

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_width(self) -> int:
        """Elements of the keys of one token in one layer."""
        return (self.num_key_value_heads or self.num_attention_heads) * self.head_width

    @property
    def parameters(self) -> int | None:
        """Parameters of a Qwen2 or Llama model, tied embeddings counted once; None for others.

        Per layer: q and o of H·(heads·d), k and v of H·(kv·d), biases on q, k, v where the
        configuration has them, three MLP matrices of H·I, two norms of H. Then the embedding V·H,
        the output head V·H unless tied, and the last norm H.
        """
        if self.model_type not in ("qwen2", "llama"):
            return None
        hidden, kv, q = self.hidden_size, self.kv_width, self.num_attention_heads * self.head_width
        biased = self.model_type == "qwen2" if self.attention_bias is None else self.attention_bias
        attention = 2 * hidden * q + 2 * hidden * kv + (q + 2 * kv if biased else 0)
        layer = attention + 3 * hidden * self.intermediate_size + 2 * hidden
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + hidden


@dataclass(frozen=True)
class Model:
    """A model folder for vLLM.

    `source` says where it came from; `seed` is set for weights that are drawn.
    """

    name: str
    folder: Path
    tokenizer: Path
    weights: Weights
    source: str
    config: Config
    seed: int | None = None
    requested_path: Path | None = None
    """The local folder that MODEL named, if it named one."""
    quantized: Quantized | None = None
    """What its config.json says of 8-bit or sparse weights."""
    converted_from: Model | None = None
    """The model that this one was converted from, where it is measured, too."""

    def record(self, dtype: str) -> ModelRecord:
        """``dtype``: of the activations, as the engine says."""
        return ModelRecord(
            name=self.name,
            weights=self.weights,
            seed=self.seed,
            source=self.source,
            dtype=dtype,
            parameters=self.config.parameters,
            quantized=self.quantized.label if self.quantized else None,
        )

    @property
    def pattern(self) -> str | None:
        """The sparsity pattern of a model that vLLM loads as a sparse one by itself."""
        return self.quantized.pattern if self.quantized else None

    @property
    def weights_label(self) -> str:
        """ "real weights", "dummy weights (seed 1)", …"""
        return f"{self.weights} weights" + (f" (seed {self.seed})" if self.seed is not None else "")

    @property
    def kv_bytes_per_token(self) -> int:
        """Size of keys and values of one token over all layers, in bytes, at 2 bytes a value."""
        return 2 * 2 * self.config.num_hidden_layers * self.config.kv_width


def resolve(name: str | None, device: str, folder: Path = MODELS, *, dummy: bool = False) -> Model:
    """The model called `name` on `device` ("cpu" or "cuda").

    Args:
        name: a local folder, a hub id, "tiny-qwen2", or None for the device's default.
        folder: where generated models are kept.
        dummy: do without weights where the catalogue has the model; nothing is fetched.

    Raises:
        WorkspaceError: no such model; the message lists the known ones.
    """
    if name is None:
        name = TINY if device == "cpu" else GPU_DEFAULT
    if name == TINY:
        return _tiny(folder)
    if (path := Path(name).expanduser()).is_dir():
        return replace(_local(path.resolve(), folder), requested_path=path.resolve())
    if dummy and (entry := catalogue().get(name)):
        return _dummy(name, entry, folder, "catalogue")
    cached, broken = _from_cache(name)
    if cached:
        return _real(name, cached, "local hub cache")
    downloaded, why_not = _from_hub(name)
    if downloaded:
        if not weights.complete(downloaded, name):
            raise WorkspaceError(
                f"MODEL={name}: the hub has no safetensors weights of it, the only format that is "
                "fetched; download it yourself and pass the folder"
            )
        return _real(name, downloaded, "hub")
    if broken:
        raise WorkspaceError(f"{broken} ({why_not})")
    if entry := catalogue().get(name):
        return _dummy(name, entry, folder, f"catalogue ({why_not})")
    known = ", ".join([TINY, *catalogue()])
    raise WorkspaceError(
        f"MODEL={name}: no such folder, not in the local hub cache, {why_not}, and not in the "
        f"catalogue; pass a folder or one of: {known}"
    )


def original(model: Model, device: str, folder: Path = MODELS) -> Model:
    """The unquantized model that `model` was converted from: a folder beside it, or a hub id.

    Raises:
        WorkspaceError: it is not known, or not on this machine.
    """
    name = model.quantized.source if model.quantized else None
    if name is None:
        raise WorkspaceError(
            f"MODEL={model.name}: its config.json does not say what it was converted from; choose "
            "another baseline than the unquantized model"
        )
    beside = (model.requested_path or model.folder).parent / name
    try:
        found = resolve(str(beside) if beside.is_dir() else name, device, folder)
    except WorkspaceError as error:
        raise WorkspaceError(
            f"MODEL={model.name} was converted from {name}, which is neither in {beside.parent} "
            "nor a model that can be had by that name; put its folder there, or choose another "
            "baseline than the unquantized model"
        ) from error
    if "dummy" in (found.weights, model.weights) and found.weights != model.weights:
        raise WorkspaceError(
            f"MODEL={model.name} has {model.weights} weights and {name}, from which it was "
            f"converted, has {found.weights} ones here; put its weights into its folder, or choose "
            "another baseline than the unquantized model"
        )
    return found


def catalogue() -> dict[str, JsonObject]:
    """Hub id -> config.json values, with "parameters" (the published count) beside them."""
    data = tomllib.loads(CATALOGUE.read_text())
    entries = {}
    for row in data["models"]:
        values = {key: value for key, value in row.items() if key not in ("ids", "family")}
        for hub_id in row["ids"]:
            entries[hub_id] = data[row["family"]] | values
    return entries


def _tiny(folder: Path) -> Model:
    # A changed recipe gets a new folder.
    recipe = hashlib.sha256(
        Path(tiny_model.__file__).read_bytes() + Path(synthetic_tokenizer.__file__).read_bytes()
    ).hexdigest()
    path = folder / f"{TINY}-{recipe[:12]}"
    tiny_model.ensure(path)
    config = Config.model_validate(tiny_model.CONFIG)
    return Model(TINY, path, path / "tokenizer", "random", "bundled", config, tiny_model.SEED)


def _local(path: Path, folder: Path) -> Model:
    whole = weights.complete(path, str(path))
    config, quantized = _read_config(path), checkpoint.read(_read_json(path), path)
    tokenizer = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    has_tokenizer = _has_tokenizer(tokenizer)
    if whole and not has_tokenizer:
        raise WorkspaceError(
            f"MODEL={path}: it has weights and no tokenizer (none of {', '.join(TOKENIZERS)}); "
            "add the model's own"
        )
    if whole:
        source = "local folder"
        return Model(path.name, path, tokenizer, "real", source, config, quantized=quantized)
    if not has_tokenizer:
        source = "local folder without weights and tokenizer"
        return _dummy(path.name, _read_json(path), folder, source, config)
    source = "local folder without weights"
    seed = DUMMY_SEED
    return Model(path.name, path, tokenizer, "dummy", source, config, seed, quantized=quantized)


def _real(name: str, path: Path, source: str) -> Model:
    quantized = checkpoint.read(_read_json(path))
    return Model(name, path, path, "real", source, _read_config(path), quantized=quantized)


def _dummy(
    name: str, file: JsonObject, folder: Path, source: str, config: Config | None = None
) -> Model:
    """A folder with the configuration and a synthetic tokenizer; the engine draws the weights.

    Args:
        config: the values of `file`, if it has them under other names.
    """
    values = {key: value for key, value in file.items() if key != "parameters"}
    config = config or Config.model_validate(values)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    recipe = hashlib.sha256(
        text.encode() + Path(synthetic_tokenizer.__file__).read_bytes()
    ).hexdigest()
    path = folder / f"{name.replace('/', '--')}-{recipe[:12]}"
    if not path.is_dir():
        with new_folder(path) as partial:
            (partial / "config.json").write_text(text)
            synthetic_tokenizer.write(partial / "tokenizer", config.vocab_size)
    tokenizer, quantized = path / "tokenizer", checkpoint.read(values)
    return Model(name, path, tokenizer, "dummy", source, config, DUMMY_SEED, quantized=quantized)


def _read_json(path: Path) -> JsonObject:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise WorkspaceError(
            f"MODEL={path}: cannot read its config.json ({error}); "
            "pass a folder in the hub's format"
        ) from error
    if not isinstance(config, dict):
        raise WorkspaceError(f"MODEL={path}: its config.json is not an object")
    return config


def _read_config(path: Path) -> Config:
    """The configuration, read by the class that vLLM uses, which knows the names."""
    from transformers import AutoConfig

    named = "model_type" in _read_json(path)
    try:
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except ValueError:  # a type that transformers does not know: vLLM may know it
            if not named:
                raise
            from vllm.transformers_utils.config import get_config

            config = get_config(path, trust_remote_code=False)
    except Exception as error:  # which exception a wrong value raises depends on the class
        raise WorkspaceError(
            f"MODEL={path}: vLLM cannot read its config.json "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from error
    text = config.get_text_config()  # multi-modal models keep the text part apart
    names = Config.model_fields.keys() - {"torch_dtype"}  # which vLLM chooses
    # A list, one value per layer, is not read.
    values = {k: value for k in names if isinstance(value := getattr(text, k, None), (int, str))}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        wrong = ", ".join(str(one["loc"][0]) for one in error.errors())
        raise WorkspaceError(f"MODEL={path}: its config.json lacks {wrong}") from error


def _has_tokenizer(folder: Path) -> bool:
    """Whether the folder has tokenizer files; raises if one is damaged."""
    files = [p for pattern in TOKENIZERS for p in folder.glob(pattern) if not p.is_dir()]
    for path in files:
        if reason := weights.damage(path):
            raise WorkspaceError(f"MODEL={folder}: {path.name} {reason}; fetch the model again")
    return bool(files)


def _from_cache(name: str) -> tuple[Path | None, str]:
    """The complete snapshot, or None and what is wrong with it, "" if it is not in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, local_files_only=True, allow_patterns=FILES))
    except (LocalEntryNotFoundError, HFValidationError):
        return None, ""
    # A download that was cut off leaves a snapshot without all of its files.
    try:
        whole = weights.complete(path, name) and _has_tokenizer(path)
    except WorkspaceError as error:
        return None, str(error)
    if whole and (path / "config.json").is_file():
        return path, ""
    unfinished = next((path.parents[1] / "blobs").glob("*.incomplete"), None)
    return None, f"MODEL={name}: its download was cut off ({unfinished})" if unfinished else ""


def _from_hub(name: str) -> tuple[Path | None, str]:
    """The downloaded folder, or None and why not, as part of a sentence."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    if HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return None, "the hub is switched off by HF_HUB_OFFLINE"
    try:
        HfApi().model_info(name, timeout=PROBE_SECONDS)
        return Path(snapshot_download(name, allow_patterns=FILES)), ""
    except HFValidationError:
        return None, "not a valid hub id"
    except GatedRepoError:
        return None, "the hub requires an accepted licence and HF_TOKEN for it"
    except RepositoryNotFoundError:
        return None, "the hub does not have it (or requires HF_TOKEN)"
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        return None, f"the hub answered {status}"
    except Exception as error:  # which exception a dead network raises depends on the HTTP library
        if isinstance(error, OSError) and error.filename:
            raise WorkspaceError(
                f"MODEL={name}: cannot be downloaded, {error.filename} cannot be written "
                f"({error.strerror}); free some space, or set HF_HOME to a folder that can be"
            ) from error
        return None, f"the hub is not reachable ({type(error).__name__})"
