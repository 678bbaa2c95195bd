# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.bench OPERATION``: every backend against what a user would call
instead, on this GPU.

An operation is measured at the shapes of its ``cases.py``. Prints a table, writes one JSON record
with its provenance and two plots beside it. ``--record FILE`` shows an existing record; that needs
no GPU. Exits with 1 if a backend of this package or the baseline gives a wrong result or fails, or
if there is no GPU.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from custom_kernels import registry
from custom_kernels.command import UsageError, command, exit_with


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, report. Returns the exit status."""
    for package in ("torch", "rich", "matplotlib", "pydantic"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"{package} is not installed; run `make dev`, or install custom-kernels[bench]"
            )
    from custom_kernels.bench import plots, record, report
    from custom_kernels.bench.plan import plan_of

    options = parser().parse_args(arguments)
    if options.record:
        recorded = record.read(options.record)
        output = options.output and options.output / options.record.name
        report.show(recorded, plots.draw(recorded, output) if output else [])
        return 0
    if options.operation is None:
        raise UsageError("name an operation, or a record with --record")
    definition = registry.operation(options.operation).cases
    import torch

    from custom_kernels.bench.run import failed, run

    if not torch.cuda.is_available():
        raise UsageError(
            "timing kernels needs a GPU and torch sees none; without one, "
            f"`make test K={options.operation}` checks them and "
            f"`make inspect K={options.operation}` shows what the compilers made of them"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    measured = run(plan_of(options, definition), definition, device)
    path = record.write(measured, options.output or record.results_folder())
    report.show(measured, [path, *plots.draw(measured, path)])
    if options.tune:
        from custom_kernels.tuning.adopt import adopt

        for line in adopt(measured):
            print(f"tuned: {line}")
    return 1 if failed(measured) else 0


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    found = argparse.ArgumentParser(prog="python -m custom_kernels.bench", description=__doc__)
    found.add_argument(
        "operation", nargs="?", help=f"one of {', '.join(map(str, registry.operations()))}"
    )
    found.add_argument(
        "--model", action="append", help="a model of the operation's cases; repeatable"
    )
    found.add_argument("--tokens", type=int, nargs="+", help="values of M")
    found.add_argument(
        "--pattern", nargs="+", default=[], help="sparsity patterns, for example 2:4 6:8"
    )
    found.add_argument(
        "--shapes", type=Path, help="measure the shapes of a capture, weighted by their calls"
    )
    found.add_argument("--top", type=int, default=24, help="so many of them, the costliest")
    found.add_argument("--backend", help="names with commas; default: all that can run here")
    found.add_argument("--dtype", help="default: the operation's first")
    found.add_argument("--seconds", type=float, default=0.25, help="device time per shape")
    found.add_argument("--repetitions", type=int, default=3, help="each with fresh inputs")
    found.add_argument("--output", type=Path, help="folder for the record and the plots")
    found.add_argument(
        "--tune", action="store_true", help="choose backends by these results from now on"
    )
    found.add_argument("--record", type=Path, help="show this record instead of measuring")
    return found


if __name__ == "__main__":
    exit_with(main)
