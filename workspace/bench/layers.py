# SPDX-License-Identifier: Apache-2.0
"""Layers of a model by kind: "model.layers.*.mlp.down_proj" stands for all of them."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")

UPSTREAM = "vLLM's own"
"""What runs a layer without a custom kernel."""


@dataclass(frozen=True)
class Kind:
    """Layers whose names differ only in their indices, and the calls of one kernel in them."""

    name: str
    kernel: str
    layers: int
    fewest: int
    most: int
    """Calls in a layer."""


def folded(name: str) -> str:
    """ "model.layers.3.mlp.down_proj" -> "model.layers.*.mlp.down_proj"."""
    return _INDEX.sub("*", name)


def one_of_each(names: Iterable[str], most: int = 8) -> list[str]:
    """The first name of each kind, for the first `most` kinds."""
    first = {folded(name): name for name in sorted(names, reverse=True)}
    return sorted(first.values())[:most]


def kinds(counted: Mapping[str, Mapping[str, int]]) -> list[Kind]:
    """Calls by layer and kernel, kind by kind in the order of the layers."""
    calls: dict[tuple[str, str], list[int]] = {}
    for name, kernels in counted.items():
        for kernel, count in (kernels or {UPSTREAM: 0}).items():
            calls.setdefault((folded(name), kernel), []).append(count)
    return [
        Kind(name, kernel, len(counts), min(counts), max(counts))
        for (name, kernel), counts in calls.items()
    ]


def total(processes: Iterable[Mapping[str, Mapping[str, int]]]) -> Mapping[str, Counter[str]]:
    """Calls by layer and kernel, over all processes."""
    result: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for layers in processes:
        for name, kernels in layers.items():
            result[name].update(kernels)
    return result
