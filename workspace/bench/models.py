# SPDX-License-Identifier: Apache-2.0
"""From MODEL to a folder that vLLM can load, and whether its weights are real.

In this order: a local folder, the hub's local cache, the hub, the catalogue of architectures
(dummy weights). Without MODEL: the bundled tiny model on the CPU, Qwen2.5-0.5B on a GPU.
"""

import hashlib
import json
import os
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workspace.bench import synthetic_tokenizer, tiny_model, weights
from workspace.bench.record import Weights
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
CONFIG = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("attention_bias", "tie_word_embeddings"),
)
"""What is read of a configuration. Files may use other names: GPT-2's has n_embd."""
TOKENIZERS = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Model:
    """A model folder for vLLM.

    `source` says where it came from; `seed` is set for weights that are drawn; `config` has the
    values named in CONFIG that the model has.
    """

    name: str
    folder: Path
    tokenizer: Path
    weights: Weights
    source: str
    config: dict[str, Any]
    seed: int | None = None
    path_asked_for: Path | None = None
    """The local folder that MODEL named, if it named one."""

    @property
    def weights_label(self) -> str:
        """ "real weights", "dummy weights (seed 1)", …"""
        return f"{self.weights} weights" + (f" (seed {self.seed})" if self.seed is not None else "")

    @property
    def max_length(self) -> int:
        """Most tokens, input and output together, that the model takes."""
        return int(self.config.get("max_position_embeddings", 2**31))

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def kv_bytes_per_token(self) -> int:
        """Size of keys and values of one token over all layers, in bytes, at 2 bytes a value."""
        heads = int(self.config["num_attention_heads"])
        kv_heads = int(self.config.get("num_key_value_heads") or heads)
        head_dim = int(self.config.get("head_dim") or int(self.config["hidden_size"]) // heads)
        return 2 * 2 * int(self.config["num_hidden_layers"]) * kv_heads * head_dim


def resolve(name: str | None, device: str, folder: Path = MODELS) -> Model:
    """The model called `name` on `device` ("cpu" or "cuda").

    Args:
        name: a local folder, a hub id, "tiny-qwen2", or None for the device's default.
        folder: where generated models are kept.

    Raises:
        WorkspaceError: no such model; the message lists the known ones.
    """
    if name is None:
        name = TINY if device == "cpu" else GPU_DEFAULT
    if name == TINY:
        return _tiny(folder)
    if (path := Path(name).expanduser()).is_dir():
        return replace(_local(path.resolve(), folder), path_asked_for=path.resolve())
    cached, broken = _from_cache(name)
    if cached:
        return _real(name, cached, "local hub cache")
    downloaded, why_not = _from_hub(name)
    if downloaded:
        if not weights.there(downloaded, name):
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


def catalogue() -> dict[str, dict[str, Any]]:
    """Hub id -> config.json values, with "parameters" (the published count) beside them."""
    data = tomllib.loads(CATALOGUE.read_text())
    entries = {}
    for row in data["models"]:
        values = {key: value for key, value in row.items() if key not in ("ids", "family")}
        for hub_id in row["ids"]:
            entries[hub_id] = data[row["family"]] | values
    return entries


def count_parameters(config: dict[str, Any]) -> int:
    """Parameters of a Qwen2 or Llama model, tied embeddings counted once.

    Per layer: q and o of H·(heads·d), k and v of H·(kv·d), biases on q, k, v where the
    configuration has them, three MLP matrices of H·I, two norms of H. Then the embedding V·H,
    the output head V·H unless tied, and the last norm H.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, kv_heads * head_dim
    biased = config.get("attention_bias", config["model_type"] == "qwen2")
    attention = 2 * hidden * q + 2 * hidden * kv + (q + 2 * kv if biased else 0)
    layer = attention + 3 * hidden * config["intermediate_size"] + 2 * hidden
    embedding = config["vocab_size"] * hidden
    heads_and_embedding = embedding if config.get("tie_word_embeddings", False) else 2 * embedding
    return int(config["num_hidden_layers"] * layer + heads_and_embedding + hidden)


def parameters(config: dict[str, Any]) -> int | None:
    """`count_parameters` where it knows the architecture, else None."""
    return count_parameters(config) if config.get("model_type") in ("qwen2", "llama") else None


def _tiny(folder: Path) -> Model:
    # A changed recipe gets a new folder.
    recipe = hashlib.sha256(
        Path(tiny_model.__file__).read_bytes() + Path(synthetic_tokenizer.__file__).read_bytes()
    ).hexdigest()
    path = tiny_model.ensure(folder / f"{TINY}-{recipe[:12]}")
    return Model(
        TINY, path, path / "tokenizer", "random", "bundled", tiny_model.CONFIG, tiny_model.SEED
    )


def _local(path: Path, folder: Path) -> Model:
    whole = weights.there(path, str(path))
    config = _read_config(path)
    tokenizer = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    has_tokenizer = _has_tokenizer(tokenizer)
    if whole and not has_tokenizer:
        raise WorkspaceError(
            f"MODEL={path}: it has weights and no tokenizer (none of {', '.join(TOKENIZERS)}); "
            "add the model's own"
        )
    if whole:
        return Model(path.name, path, tokenizer, "real", "local folder", config)
    if not has_tokenizer:
        source = "local folder without weights and tokenizer"
        return _dummy(path.name, _read_json(path), folder, source, config)
    source = "local folder without weights"
    return Model(path.name, path, tokenizer, "dummy", source, config, seed=DUMMY_SEED)


def _real(name: str, path: Path, source: str) -> Model:
    return Model(name, path, path, "real", source, _read_config(path))


def _dummy(
    name: str, file: dict[str, Any], folder: Path, source: str, config: dict[str, Any] | None = None
) -> Model:
    """A folder with the configuration and a synthetic tokenizer; the engine draws the weights.

    `config` has the values of CONFIG if the file has them under other names.
    """
    values = {key: value for key, value in file.items() if key != "parameters"}
    config = config or values
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    recipe = hashlib.sha256(
        text.encode() + Path(synthetic_tokenizer.__file__).read_bytes()
    ).hexdigest()
    path = folder / f"{name.replace('/', '--')}-{recipe[:12]}"
    if not path.is_dir():
        with new_folder(path) as partial:
            (partial / "config.json").write_text(text)
            synthetic_tokenizer.write(partial / "tokenizer", config["vocab_size"])
    return Model(name, path, path / "tokenizer", "dummy", source, config, seed=DUMMY_SEED)


def _read_json(path: Path) -> dict[str, Any]:
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


def _read_config(path: Path) -> dict[str, Any]:
    """The values of CONFIG, read by the class that vLLM uses, which knows the names."""
    from transformers import AutoConfig

    named = "model_type" in _read_json(path)
    try:
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except ValueError:  # a type that transformers does not know: vLLM has some of its own
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
    values = {name: value for name in CONFIG if (value := getattr(text, name, None)) is not None}
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in needed if key not in values]:
        raise WorkspaceError(f"MODEL={path}: its config.json lacks {', '.join(missing)}")
    return values


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
        whole = weights.there(path, name) and _has_tokenizer(path)
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
