# SPDX-License-Identifier: Apache-2.0
"""What pruning and quantization cost: convert.json beside the weights, and a short table of it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from workspace.convert.description import JsonObject
from workspace.convert.layer import Error, total

NAME = "convert.json"
WORST = 3
"""Layers that the table names."""


class Record(BaseModel):
    """convert.json. While the folder is not complete, it says what of it is."""

    inputs: JsonObject
    """Everything that the result depends on: shards of other inputs must not be mixed."""
    shards: dict[str, dict[str, Error]] = {}
    """File → layers in it → their errors."""

    @property
    def layers(self) -> dict[str, Error]:
        return {name: error for errors in self.shards.values() for name, error in errors.items()}


def kinds(layers: dict[str, Error]) -> dict[str, Error]:
    """Layers of the same name, such as down_proj, in one sum."""
    found: dict[str, list[Error]] = {}
    for name, error in layers.items():
        found.setdefault(name.rpartition(".")[2], []).append(error)
    return {kind: total(errors) for kind, errors in found.items()}


def content(record: Record) -> dict[str, Any]:
    """The finished convert.json: relative errors of Frobenius norms."""

    def figures(errors: dict[str, Error]) -> dict[str, Any]:
        return {name: _figures(error) for name, error in errors.items()}

    return {
        "inputs": record.inputs,
        "total": _figures(total(record.layers.values())),
        "kinds": figures(kinds(record.layers)),
        "layers": figures(record.layers),
    }


def _figures(error: Error) -> dict[str, float]:
    figures = {"relative_error": error.relative}
    if error.weighted is not None:
        figures["weighted_error"] = error.weighted
    return figures


def table(layers: dict[str, Error]) -> Table:
    """Errors by kind of layer, of the worst layers, and in all."""
    whole = total(layers.values())
    columns = ["layers", "relative error", *(["weighted"] if whole.weighted is not None else [])]
    table = Table(title="weights lost, by Frobenius norm", title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "layers" else "right")

    def add(name: str, error: Error, *, end: bool = False) -> None:
        figures = [figure for figure in (error.relative, error.weighted) if figure is not None]
        table.add_row(name, *(f"{figure:.4f}" for figure in figures), end_section=end)

    rows = sorted(kinds(layers).items())
    for kind, error in rows:
        add(f"all {kind}", error, end=kind == rows[-1][0])
    worst = sorted(layers, key=lambda name: layers[name].relative, reverse=True)[:WORST]
    for name in worst:
        add(name, layers[name], end=name == worst[-1])
    add("all", whole)
    return table


def show(layers: dict[str, Error]) -> None:
    Console().print(table(layers))
