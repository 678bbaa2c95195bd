# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.bench OPERATION``: a backend against the reference, on this GPU.

An operation is measured at the shapes of its ``cases.py``. Prints a table, writes one JSON record
with its provenance and a picture beside it, and exits with 1 if a result is wrong or there is no
GPU.
"""

import argparse
import datetime
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from custom_kernels import build

BASELINE = "reference"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, report. Returns the exit status."""
    try:
        import torch
        from rich.console import Console
    except ImportError as error:
        print(f"error: {error}; run `make dev`, or install custom-kernels[bench]", file=sys.stderr)
        return 1
    from custom_kernels import registry, timing

    parser = argparse.ArgumentParser(prog="python -m custom_kernels.bench", description=__doc__)
    parser.add_argument("operation", choices=registry.operations())
    parser.add_argument(
        "--model", action="append", help="a model of the operation's cases; repeatable"
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="values of M")
    parser.add_argument("--backend", help="default: the best for this device")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.25, help="device time per shape")
    parser.add_argument("--output", type=Path, help="folder for the record and the picture")
    options = parser.parse_args(arguments)

    console = Console(width=None if sys.stdout.isatty() else 150)
    if not torch.cuda.is_available():
        print(
            "error: kernel benchmarks need a GPU and torch sees none; run this on a GPU machine",
            file=sys.stderr,
        )
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = getattr(torch, options.dtype)
    definition = import_module(f"custom_kernels.{options.operation}.cases")
    models = options.model or list(definition.DEFAULT_MODELS)
    unknown = sorted(set(models) - set(definition.MODELS))
    if unknown:
        print(
            f"error: no model {', '.join(unknown)}; there are: {', '.join(definition.MODELS)}",
            file=sys.stderr,
        )
        return 1
    try:
        backend = options.backend or registry.best(options.operation, device, dtype)
        custom, baseline = (
            registry.runner(options.operation, name, device, dtype) for name in (backend, BASELINE)
        )
    except (registry.BackendError, build.BuildError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if backend == BASELINE:
        print(
            f"error: {BASELINE} is what the others are compared with; name another --backend",
            file=sys.stderr,
        )
        return 1

    tokens = options.tokens or list(definition.TOKENS)
    # What repeats this run; where its record goes is not part of it.
    command = shlex.join(
        ["python", "-m", "custom_kernels.bench", options.operation]
        + [word for model in models for word in ("--model", model)]
        + ["--tokens", *map(str, tokens), "--backend", backend]
        + ["--dtype", options.dtype, "--seconds", str(options.seconds)]
    )
    exact = import_module(f"custom_kernels.{options.operation}.reference").exact
    limits = timing.ceilings(device)
    console.print(
        f"{options.operation}.{backend} against {BASELINE}, {options.dtype}, on "
        f"{torch.cuda.get_device_name(device)}: "
        f"copies {limits.bytes_per_second / 1e12:.2f} TB/s, "
        f"multiplies {limits.flops_per_second / 1e12:.0f} TFLOP/s"
    )
    rows, failures = [], []
    for case in definition.cases(models, tokens, dtype):
        try:
            result = timing.compare(case, custom, baseline, exact, device, options.seconds)
        except (timing.WrongResultError, torch.OutOfMemoryError) as error:
            failures.append(f"{case.labels}: {error}")
            continue
        rows.append(_row(result, limits))
        if sys.stderr.isatty():
            print(f"\r{len(rows)} shapes measured", end="", file=sys.stderr)
        torch.cuda.empty_cache()

    record = {
        "operation": options.operation,
        "backend": backend,
        "baseline": BASELINE,
        "dtype": options.dtype,
        "ceilings": asdict(limits),
        "summary": _summary(rows),
        "failures": failures,
        "rows": rows,
        "provenance": _provenance(torch, device, options.operation, command),
    }
    console.print(_table(rows))
    for name, summary in record["summary"].items():
        console.print(
            f"{name}: geometric mean {summary['geometric_mean']:.3f}, "
            f"lowest {summary['lowest']:.3f}, {summary['verdicts']}"
        )
    path = _write(record, options.output or _results_folder())
    console.print(f"record: {path}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _row(result: Any, limits: Any) -> dict[str, Any]:
    case = result.case
    floor = max(case.bytes / limits.bytes_per_second, case.flops / limits.flops_per_second)
    seconds = result.custom.median * 1e-6
    return {
        **case.labels,
        "custom_us": asdict(result.custom),
        "baseline_us": asdict(result.baseline),
        "ratio": result.ratio,
        "ratio_low": result.low,
        "ratio_high": result.high,
        "verdict": result.verdict,
        "tflops": case.flops / seconds / 1e12,
        "gbytes_per_second": case.bytes / seconds / 1e9,
        "percent_of_copy": 100 * case.bytes / seconds / limits.bytes_per_second,
        "percent_of_matmul": 100 * case.flops / seconds / limits.flops_per_second,
        "percent_of_floor": 100 * floor / seconds,
        "input_sets": result.sets,
        "blocks": result.blocks,
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all rows and per model: geometric mean and lowest of baseline time / custom time."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row.get("model", "all")), []).append(row)
    if len(groups) > 1:
        groups["all"] = rows
    return {name: _summarize(group) for name, group in groups.items()}


def _summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [row["ratio"] for row in rows]
    verdicts = [row["verdict"] for row in rows]
    return {
        "shapes": len(rows),
        "geometric_mean": math.exp(sum(map(math.log, ratios)) / len(ratios)),
        "lowest": min(ratios),
        "highest": max(ratios),
        "verdicts": {name: verdicts.count(name) for name in sorted(set(verdicts))},
    }


def _table(rows: Iterable[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(header_style="bold")
    columns = ["model", "layer", "M", "N", "K"]
    for name in columns:
        table.add_column(name, justify="right" if name in "MNK" else "left")
    for name in (
        "baseline µs",
        "custom µs",
        "p20-p80",
        "ratio",
        "TFLOP/s",
        "GB/s",
        "% of floor",
        "verdict",
    ):
        table.add_column(name, justify="right")
    colours = {"FASTER": "green", "SLOWER": "red", "AMBIGUOUS": "yellow"}
    for row in rows:
        custom = row["custom_us"]
        verdict = row["verdict"]
        colour = colours.get(verdict)
        table.add_row(
            *(str(row[name]) for name in columns),
            f"{row['baseline_us']['median']:.2f}",
            f"{custom['median']:.2f}",
            f"{custom['p20']:.2f}-{custom['p80']:.2f}",
            f"{row['ratio']:.3f}",
            f"{row['tflops']:.0f}",
            f"{row['gbytes_per_second']:.0f}",
            f"{row['percent_of_floor']:.0f}",
            f"[{colour}]{verdict}[/]" if colour else verdict,
        )
    return table


def _provenance(torch: Any, device: Any, operation: str, command: str) -> dict[str, Any]:
    commit = _output(["git", "-C", str(build.PACKAGE), "rev-parse", "HEAD"])
    properties = torch.cuda.get_device_properties(device)
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": _output(
            [
                "nvidia-smi",
                "--query-gpu=driver_version",
                "--format=csv,noheader",
                "-i",
                str(device.index),
            ]
        ),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "git_commit": commit,
        "git_dirty": None if commit is None else _dirty(),
        "kernel_source_hash": build.source_hash(),
        "compiled": {
            built.source.name: {"library": built.path.name, "architectures": built.architectures}
            for built in (
                build.build(source, (build.architecture(device),))
                for source in build.sources()
                if source.operation == operation
            )
        },
        "tool_chain": build.toolchain().versions(),
    }


def _dirty() -> bool | None:
    status = _output(
        ["git", "-C", str(build.PACKAGE), "status", "--porcelain", "--", str(build.PACKAGE)]
    )
    return None if status is None else bool(status)


def _output(command: list[str]) -> str | None:
    """What a command prints, None where it cannot be had."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _results_folder() -> Path:
    root = build.checkout()
    return (root or Path.cwd()) / "benchmarks" / "results"


def _write(record: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stamp = record["provenance"]["time"].replace(":", "").replace("+0000", "Z")
    path = folder / f"kernels-{record['operation']}-{record['backend']}-{stamp}.json"
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(path)
    if record["rows"]:
        draw(record, path.with_suffix(".png"))
    return path


def draw(record: dict[str, Any], path: Path) -> None:
    """One panel per model: baseline time / custom time over M, a line per layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in record["rows"]))
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(6 * len(models), 4.2), sharey=True, squeeze=False
    )
    for panel, model in zip(panels[0], models, strict=True):
        rows = [row for row in record["rows"] if row["model"] == model]
        for layer in dict.fromkeys(row["layer"] for row in rows):
            line = [row for row in rows if row["layer"] == layer]
            panel.plot(
                [row["M"] for row in line],
                [row["ratio"] for row in line],
                marker="o",
                markersize=3.5,
                label=f"{layer} {line[0]['N']}x{line[0]['K']}",
            )
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_title(f"{model}: geometric mean {record['summary'][model]['geometric_mean']:.3f}")
        panel.set_xlabel("M (tokens)")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    panels[0][0].set_ylabel(f"{record['baseline']} time / {record['backend']} time")
    figure.suptitle(
        f"{record['operation']}.{record['backend']} on {record['provenance']['device']}, "
        f"{record['dtype']}, cold L2 (above 1: faster)"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
