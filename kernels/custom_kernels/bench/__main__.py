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
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from custom_kernels import registry
from custom_kernels.bench import plots, records
from custom_kernels.bench.plan import UsageError, plan_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, report. Returns the exit status."""
    try:
        return _main(arguments)
    except (UsageError, registry.BackendError, records.RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _main(arguments: Sequence[str] | None) -> int:
    for package in ("torch", "rich", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"{package} is not installed; run `make dev`, or install custom-kernels[bench]"
            )
    options = _parser().parse_args(arguments)
    if options.record:
        return _show(records.read(options.record), options.record, options.output)
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
    plan = plan_of(options, definition)
    record = run(plan, definition, device)
    path = records.write(record, options.output or records.results_folder())
    _report(record, [path, *plots.draw(record, path)])
    if options.tune:
        from custom_kernels.tuning.adopt import adopt

        for line in adopt(record):
            print(f"tuned: {line}")
    return 1 if failed(record) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m custom_kernels.bench", description=__doc__)
    parser.add_argument(
        "operation", nargs="?", help=f"one of {', '.join(map(str, registry.operations()))}"
    )
    parser.add_argument(
        "--model", action="append", help="a model of the operation's cases; repeatable"
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="values of M")
    parser.add_argument(
        "--pattern", nargs="+", default=[], help="sparsity patterns, for example 2:4 6:8"
    )
    parser.add_argument("--backend", help="names with commas; default: all that can run here")
    parser.add_argument("--dtype", help="default: the operation's first")
    parser.add_argument("--seconds", type=float, default=0.25, help="device time per shape")
    parser.add_argument("--repetitions", type=int, default=3, help="each with fresh inputs")
    parser.add_argument("--output", type=Path, help="folder for the record and the plots")
    parser.add_argument(
        "--tune", action="store_true", help="choose backends by these results from now on"
    )
    parser.add_argument("--record", type=Path, help="show this record instead of measuring")
    return parser


def _report(record: records.Record, files: Sequence[Path]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    console.print(records.headline(record), markup=False)
    for name, reason in record["skipped"].items():
        console.print(f"not timed: {name}: {reason}", markup=False)
    console.print(records.table(record))
    for line in records.summary_lines(record):
        console.print(line, markup=False)
    for warning in record["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    for failure in record["failures"]:
        print(f"failed: {failure}", file=sys.stderr)
    for path in files:
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    if command := record["provenance"].get("command"):
        console.print(f"repeat: {command}", markup=False, soft_wrap=True)


def _show(record: records.Record, path: Path, output: Path | None) -> int:
    """Show a record that is there already; its plots go to ``output`` if that is given."""
    _report(record, plots.draw(record, output / path.name) if output else [])
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader may close the pipe: `| head`
    sys.exit(main())
