# SPDX-License-Identifier: Apache-2.0
"""`make convert`: find the linear layers, convert file by file, describe, put in place."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from custom_kernels import sparsity
from pydantic import ValidationError
from rich.progress import TaskID
from safetensors import safe_open

from workspace import verbs
from workspace.convert import checkpoint, layers, norms, place, report
from workspace.convert.checkpoint import Shard
from workspace.convert.description import Dtype, JsonObject, quantization_config
from workspace.convert.layer import Converter, Error, threads, total
from workspace.convert.writer import Stored, new_file
from workspace.environment.progress import LoggedProgress, bytes_progress
from workspace.host.errors import WorkspaceError
from workspace.host.files import remove_partial, write_file
from workspace.host.git import git
from workspace.host.paths import ROOT
from workspace.host.text import duration, plural, say

NORMS = Path("calibration", "norms.safetensors")
"""In a folder of its own: of the model's folder engines load every safetensors file."""

STORED: dict[Dtype, str] = {"fp8": "F8_E4M3", "int8": "I8"}
"""What safetensors calls the dtypes."""
COPIED = 1 << 24
"""Bytes of a tensor that is not converted which one thread copies at a time."""


@dataclass(frozen=True)
class Source:
    """The model that is converted.

    Args:
        name: a hub id or a folder's name, no path.
        folder: in the hub's format.
        tokenizer: the folder of its tokenizer.
        has_weights: whether the folder has them.
    """

    name: str
    folder: Path
    tokenizer: Path
    has_weights: bool


def run(options: verbs.Convert, source: Source) -> None:
    if not options.out:
        raise WorkspaceError("name the folder to write: make convert MODEL=… OUT=models/…")
    if not (source.has_weights or options.dummy):
        raise WorkspaceError(
            f"MODEL={source.name} has no weights here; DUMMY=1 writes a model whose weights the "
            "engine draws"
        )
    try:
        pattern = sparsity.pattern(options.pattern or "2:4")
    except ValueError as error:
        raise WorkspaceError(f"PATTERN: {error}") from error
    dtype = options.dtype or "fp8"
    out = Path(options.out).expanduser().resolve()
    place.check(out, source.folder.resolve(), force=options.force)
    shards = checkpoint.shards(source.folder) if not options.dummy else []
    matrices = {name for shard in shards for name in shard.matrices} if shards else None
    found = layers.find(source.folder, pattern.group, matrices)
    inputs = _inputs(source, shards, str(pattern), dtype, options)
    started = time.monotonic()
    with place.unfinished(out) as folder:
        record = _begin(folder, inputs)
        place.check_space(folder, _needed(shards, record, found, dtype))
        weighted = _norms(folder, source, options, found)
        _convert(shards, folder, record, found, weighted, Converter(str(pattern), dtype))
        _describe(folder, source, shards, record, found)
        place.put(folder, out)
    if record.layers:
        report.show(record.layers)
    what = plural(len(found.linear), "linear layer") + f" {pattern}, {dtype}"
    say(f"{out}: {what}, {duration(time.monotonic() - started)}")


def _inputs(
    source: Source, shards: list[Shard], pattern: str, dtype: Dtype, options: verbs.Convert
) -> JsonObject:
    """Everything that the weights depend on, without a path."""
    files: JsonObject = {}
    for shard in shards:
        stat = shard.path.stat()
        files[shard.path.name] = [stat.st_size, stat.st_mtime_ns]
    scores: JsonObject | None = None
    for kind, given in (("norms", options.scores), ("text", options.calibrate)):
        if given:
            path = Path(given).expanduser()
            try:
                sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise WorkspaceError(f"{given}: cannot be read ({error.strerror})") from error
            scores = {"kind": kind, "name": path.name, "sha256": sha256}
    return {
        "model": source.name,
        "files": files,
        "pattern": pattern,
        "dtype": dtype,
        "scores": scores,
        "workspace": git("rev-parse", "HEAD", tree=ROOT, check=False).strip() or None,
    }


def _begin(folder: Path, inputs: JsonObject) -> report.Record:
    """The record of what is finished in `folder`; of other inputs everything is removed."""
    path = folder / report.NAME
    try:
        record = report.Record.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        record = None
    if record and record.inputs == inputs:
        remove_partial(folder)
        if record.shards:
            say(f"going on after {plural(len(record.shards), 'finished file')}")
        return record
    if path.exists():
        say(f"starting anew: what was left in {folder} was of another model or other options")
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    record = report.Record(inputs=inputs)
    write_file(path, record.model_dump_json().encode())
    return record


def _needed(shards: list[Shard], record: report.Record, found: layers.Layers, dtype: Dtype) -> int:
    """Bytes still to be written."""
    needed = 0
    for shard in shards:
        for name, size in shard.sizes.items() if shard.path.name not in record.shards else ():
            n, k = found.linear.get(name.removesuffix(".weight"), (0, 0))
            needed += n * (k + 4) if n and name.endswith(".weight") else size
    return needed


def _norms(
    folder: Path, source: Source, options: verbs.Convert, found: layers.Layers
) -> dict[str, torch.Tensor]:
    """The norms of SCORES or CALIBRATE, kept in `folder`; empty without either."""
    path = folder / NORMS
    if path.is_file():  # of the same inputs
        return norms.read(path, found)
    if options.scores:
        gathered = norms.read(Path(options.scores).expanduser(), found)
    elif options.calibrate:
        text = Path(options.calibrate).expanduser()
        gathered = norms.gather(text, source.folder, source.tokenizer, found)
    else:
        return {}
    path.parent.mkdir(exist_ok=True)
    _save(gathered, path)
    return gathered


def _convert(
    shards: list[Shard],
    folder: Path,
    record: report.Record,
    found: layers.Layers,
    weighted: dict[str, torch.Tensor],
    converter: Converter,
) -> None:
    """Write every file that is not finished; the record says after each which are."""
    todo = [shard for shard in shards if shard.path.name not in record.shards]
    with bytes_progress() as progress:
        task = progress.add_task("converting", total=sum(sum(one.sizes.values()) for one in todo))
        for shard in todo:
            errors = _convert_shard(shard, folder, found, weighted, converter, progress, task)
            record.shards[shard.path.name] = errors
            write_file(folder / report.NAME, record.model_dump_json().encode())


def _convert_shard(
    shard: Shard,
    folder: Path,
    found: layers.Layers,
    weighted: dict[str, torch.Tensor],
    converter: Converter,
    progress: LoggedProgress,
    task: TaskID,
) -> dict[str, Error]:
    """Write the converted file; returns its layers' errors.

    The source is mapped, and each thread writes a block as soon as it has converted it: no tensor
    is in memory as a whole.
    """
    tensors: dict[str, torch.Tensor] = {}
    stored: dict[str, Stored] = {}
    blocks: list[tuple[str, slice]] = []
    layer_of: dict[str, str] = {}
    with safe_open(shard.path, framework="pt") as file:
        for name in shard.sizes:
            tensor: torch.Tensor = file.get_tensor(name)
            layer, _, kind = name.rpartition(".")
            if kind == "weight" and layer in found.linear:
                n, k = found.linear[layer]
                if tensor.shape != (n, k):
                    raise WorkspaceError(
                        f"{layer} has a weight {list(tensor.shape)} in {shard.path}, and by "
                        f"config.json {[n, k]}; one of the two is wrong"
                    )
                layer_of[name] = layer
                stored[name] = Stored(STORED[converter.dtype], [n, k], n * k)
                stored[f"{layer}.weight_scale"] = Stored("F32", [n, 1], 4 * n)
                tensors[name] = tensor
                blocks += [(name, rows) for rows in converter.blocks(tensor)]
            else:
                dtype = file.get_slice(name).get_dtype()
                stored[name] = Stored(dtype, list(tensor.shape), tensor.nbytes)
                tensors[name] = tensor.reshape(-1).view(torch.uint8)
                starts = range(0, tensor.nbytes, COPIED)
                blocks += [(name, slice(start, start + COPIED)) for start in starts]

    def convert(block: tuple[str, slice]) -> Error | None:
        name, part = block
        values, layer = tensors[name][part], layer_of.get(name)
        if layer is None:
            write(name, part.start, values)
            return None
        quantized, scale, error = converter(layer, values, weighted.get(layer))
        write(name, part.start * values.shape[1], quantized)
        write(f"{layer}.weight_scale", part.start * 4, scale)
        return error

    errors: dict[str, list[Error]] = {}
    # The threads have ended when the file is closed, whatever goes wrong.
    with new_file(folder / shard.path.name, stored) as write, threads() as pool:
        for (name, part), error in zip(blocks, pool.map(convert, blocks), strict=True):
            if error is not None:
                errors.setdefault(layer_of[name], []).append(error)
            progress.update(task, advance=tensors[name][part].nbytes)
    return {layer: total(parts) for layer, parts in errors.items()}


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """float32 tensors as a safetensors file."""
    stored = {name: Stored("F32", list(one.shape), one.nbytes) for name, one in tensors.items()}
    with new_file(path, stored) as write:
        for name, tensor in tensors.items():
            write(name, 0, tensor)


def _describe(
    folder: Path,
    source: Source,
    shards: list[Shard],
    record: report.Record,
    found: layers.Layers,
) -> None:
    """Everything but the weights: config.json, the index, the report, copies of the rest."""
    for relative in checkpoint.others(source.folder):
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / relative, folder / relative)
    inputs = record.inputs
    scores = inputs["scores"]
    config = json.loads((source.folder / "config.json").read_text())
    config["quantization_config"] = quantization_config(
        str(inputs["pattern"]),
        "int8" if inputs["dtype"] == "int8" else "fp8",
        [found.head],
        {
            "model": source.name,
            "scores": scores["name"] if isinstance(scores, dict) else None,
            "workspace": inputs["workspace"],
        },
    )
    _write_json(folder / "config.json", config)
    if len(shards) > 1 or (source.folder / checkpoint.INDEX).is_file():
        files: dict[str, str] = {}
        total = 0
        for shard in shards:
            with safe_open(folder / shard.path.name, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    files[name] = shard.path.name
                    total += file.get_tensor(name).nbytes
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        _write_json(folder / checkpoint.INDEX, index)
    _write_json(folder / report.NAME, report.content(record))


def _write_json(path: Path, value: object) -> None:
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
