# SPDX-License-Identifier: Apache-2.0
"""Tuning results: the backend, and its settings, measured to be best on a GPU.

They are data, a small JSON file per operation and GPU, read at run time:

- ``<cache folder>/tuning/<operation>/<gpu>.json``, the user's, is read first;
- ``<operation>/tuning/<gpu>.json`` is part of this package.

The first file with a layer decides for it. A file that cannot be read, is of another schema, or was
measured on another GPU is ignored with one warning.

Schema 1::

    {"schema": 1,
     "operation": "gemm",
     "gpu": "NVIDIA H200",
     "provenance": [{"torch": ..., "driver": ..., "git_commit": ..., "git_dirty": ...,
                     "kernel_source_hash": ..., "time": ..., "command": ...}],
     "choices": [{"dtype": "bfloat16", "N": 896, "K": 896, "bias": false,
                  "ranges": [[1, 16, "skinny"], [32, 8192, "cublaslt"]], "provenance": 0}],
     "settings": {"triton": [{"dtype": "bfloat16", "N": 896, "K": 896, "M": [1, 16],
                              "values": {"block_n": 64, ...}, "provenance": 0}]}}

``provenance`` is a list, and entries refer to it by index. A range is the first and the last M that
were measured, and covers those between: nothing is extrapolated. A backend other than the
operation's first by priority is in a range only where it was faster with 95 % confidence (see
``tuning.adopt.surely_faster``); outside of all ranges the priority decides.

``python -m custom_kernels.tuning RECORD.json`` makes such a file from the record of a benchmark
(``python -m custom_kernels.bench``).
"""

import functools
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from custom_kernels import paths, registry

if TYPE_CHECKING:
    import torch

SCHEMA = 1

Range = tuple[int, int, str]
"""First M, last M, backend."""
LayerKey = tuple[str | tuple[str, int], ...]
"""Dtype, then what tells layers apart, sorted by name."""
Tuning = dict[str, Any]

log = logging.getLogger(__name__)


class TuningError(RuntimeError):
    """A record or tuning file that cannot be used. The message is one line."""


@functools.lru_cache(maxsize=1 << 16)
def backend(
    operation: str, device: "torch.device", dtype: "torch.dtype", m: int, **layer: int | bool
) -> str:
    """The backend to run: the measured one for this GPU, layer and M, or without a measurement the
    first by priority that can run there and supports the dtype. Cached: a call is one look-up."""
    if device.type == "cuda":
        chosen = measured(operation, _gpu(device), _name(dtype), m, layer)
        if chosen is not None and _runs(operation, chosen, device):
            return chosen
    return registry.operation(operation).best(device, dtype).name


def measured(
    operation: str, gpu: str, dtype: str, m: int, layer: Mapping[str, int | bool]
) -> str | None:
    """The backend in the files for ``gpu``; None if they do not cover this layer and M."""
    ranges = _choices(operation, gpu).get(layer_key(dtype, layer), ())
    return next((name for first, last, name in ranges if first <= m <= last), None)


@functools.lru_cache(maxsize=1 << 16)
def settings(
    operation: str,
    name: str,
    device: "torch.device",
    dtype: "torch.dtype",
    m: int,
    **layer: int | bool,
) -> dict[str, Any] | None:
    """A backend's settings in the files for this GPU, layer and M; None without."""
    if device.type != "cuda":
        return None
    for file in _files(operation, _gpu(device)):
        for entry in file["settings"].get(name, ()):
            first, last = entry["M"]
            same = all(entry[key] == value for key, value in layer.items())
            if same and entry["dtype"] == _name(dtype) and first <= m <= last:
                values: dict[str, Any] = entry["values"]
                return values
    return None


def forget() -> None:
    """Read the files again at the next look-up."""
    for cached in (backend, settings, _choices, _files, _runs):
        cached.cache_clear()


def files(operation: str, gpu: str) -> list[Path]:
    """The paths of the files for a GPU, in the order in which they are read."""
    name = re.sub(r"\W+", "-", gpu).strip("-") + ".json"
    return [
        paths.cache_dir() / "tuning" / operation / name,
        paths.PACKAGE / operation / "tuning" / name,
    ]


@functools.cache
def _choices(operation: str, gpu: str) -> dict[LayerKey, tuple[Range, ...]]:
    choices: dict[LayerKey, tuple[Range, ...]] = {}
    for file in _files(operation, gpu):
        for entry in file["choices"]:
            layer = {k: v for k, v in entry.items() if k not in ("dtype", "ranges", "provenance")}
            ranges = tuple((first, last, name) for first, last, name in entry["ranges"])
            choices.setdefault(layer_key(entry["dtype"], layer), ranges)
    return choices


@functools.cache
def _files(operation: str, gpu: str) -> tuple[Tuning, ...]:
    found = []
    for path in files(operation, gpu):
        try:
            found.append(read(path, operation, gpu))
        except FileNotFoundError:
            continue
        except (OSError, TuningError) as error:
            log.warning("%s: ignored tuning file %s: %s", operation, path, error)
    return tuple(found)


def read(path: Path, operation: str, gpu: str) -> Tuning:
    """Read a tuning file. Raises TuningError if it is damaged or for another operation or GPU."""
    try:
        file = json.loads(path.read_text())
    except ValueError as error:
        raise TuningError(f"it is not JSON: {error}") from None
    if not isinstance(file, dict) or file.get("schema") != SCHEMA:
        raise TuningError(f"it is not of schema {SCHEMA}")
    if (file.get("operation"), file.get("gpu")) != (operation, gpu):
        raise TuningError(f"it is for {file.get('operation')} on {file.get('gpu')}, not on {gpu}")
    try:
        for entry in file["choices"]:
            assert isinstance(entry["dtype"], str)
            for first, last, name in entry["ranges"]:
                assert isinstance(name, str)
                assert 1 <= int(first) <= int(last)
        for entries in file["settings"].values():
            for entry in entries:
                first, last = entry["M"]
                assert isinstance(entry["dtype"], str)
                assert isinstance(entry["values"], dict)
                assert 1 <= int(first) <= int(last)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise TuningError(f"an entry is damaged ({error!r})") from None
    return file


@functools.cache
def _runs(operation: str, name: str, device: "torch.device") -> bool:
    reason = registry.operation(operation).backend(name).unavailable_reason(device)
    if reason is not None:
        log.warning(
            "%s: %s was measured to be faster but cannot run here: %s", operation, name, reason
        )
    return reason is None


@functools.cache
def _gpu(device: "torch.device") -> str:
    import torch

    return torch.cuda.get_device_name(device)


def _name(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


def layer_key(dtype: str, layer: Mapping[str, int | bool]) -> LayerKey:
    return dtype, *sorted(layer.items())
