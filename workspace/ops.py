# SPDX-License-Identifier: Apache-2.0
"""`make ops`: which layers of a model can run a kernel of ours, by which way, and which do now.

vLLM builds the model without weights, in a process of its own, with the switches of the
environment (`VLLM_CUSTOM_OPS=rms_norm make ops` shows what they replace).
"""

import json
import os
import subprocess
import sys
from collections import Counter
from typing import NamedTuple

from rich.console import JustifyMethod
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from workspace.bench import built_layers, models, operations
from workspace.bench.layers import UPSTREAM, folded
from workspace.bench.variants import LOCAL
from workspace.environment.progress import LoggedProgress
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT
from workspace.host.settings import device
from workspace.host.text import last_line
from workspace.verbs import Ops


class Layers(NamedTuple):
    """Layers whose names differ only in their indices."""

    layers: str
    vllm_class: str
    operation: str
    """What vLLM calls it."""
    custom: bool
    """Whether the switches of the environment give them to a kernel of ours."""


def run(options: Ops) -> None:
    """Print the table, or JSON."""
    from custom_kernels import registry
    from custom_kernels.command import console
    from custom_kernels.vllm import layers

    model = models.resolve(options.model, device(), dummy=True)
    found = Counter(
        Layers(folded(name), vllm_class, operation, custom)
        for name, vllm_class, operation, custom in built(model)
    )
    if options.json:
        rows = [
            {**kind._asdict(), "count": count, "way": way(kind)} for kind, count in found.items()
        ]
        print(json.dumps({"model": model.name, "layers": rows}, indent=2))
        return
    table = Table(title=f"{model.name}: layers and the ways in", title_justify="left")
    for column in ("layers", "number", "vLLM's class", "runs", "a kernel of yours"):
        justify: JustifyMethod = "right" if column == "number" else "left"
        table.add_column(column, justify=justify, no_wrap=True)
    for kind, count in found.items():
        runs = "custom kernels" if kind.custom else UPSTREAM
        table.add_row(kind.layers, str(count), kind.vllm_class, runs, way(kind))
    screen = console(140)
    screen.print(table)
    for name in [operations.GEMM, *layers.names()]:
        backends = ", ".join(one.name for one in registry.operation(name).backends)
        screen.print(f"backends of {name}: {backends}")


def way(kind: Layers) -> str:
    """How these layers run a kernel of the user's."""
    from custom_kernels.vllm import attention, layers

    names = layers.names()
    name = operations.GEMM if kind.operation == built_layers.LINEAR else kind.operation
    if name == built_layers.ATTENTION and kind.vllm_class == "Attention":
        name = attention.OPERATION
    if name == built_layers.ATTENTION:
        return "in vllm-fork/src/vllm/v1/attention"
    if name not in (operations.GEMM, *names):
        return "docs/ways-in.md, a layer of your own"
    return f"make bench OP={name}"


def built(model: models.Model) -> list[tuple[str, str, str, bool]]:
    """Name, class, operation and whether it is ours, of every layer that can be replaced.

    Raises:
        WorkspaceError: vLLM cannot build the model.
    """
    command = [
        sys.executable, "-m", built_layers.__name__, str(model.folder), str(model.tokenizer),
    ]  # fmt: skip
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with LoggedProgress(*columns) as progress:
        progress.add_task("vLLM builds the model", total=None)
        ran = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | LOCAL,
            capture_output=True,
            text=True,
            check=False,
        )
    lines = [line for line in ran.stdout.splitlines() if line.startswith(built_layers.MARK)]
    if ran.returncode or not lines:
        raise WorkspaceError(f"vLLM could not build {model.name}: {last_line(ran.stderr)}")
    return [tuple(row) for row in json.loads(lines[-1].removeprefix(built_layers.MARK))]
