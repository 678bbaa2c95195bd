# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.profile OPERATION --backend NAME``: Nsight Compute on one call of
one backend.

A child process sets up the case and warms up the backend; only the one call after that is
profiled, with flushed caches and with the clocks as they are. Printed are the key figures of each
kernel, which of memory, arithmetic and latency bounds it, the source lines at which most warps
waited, and the difference to the last profile of the same backend and case. The report, for
``ncu-ui``, goes to benchmarks/results. Exits with 1 if there is no GPU, no ``ncu``, or nothing to
profile.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from custom_kernels import registry
from custom_kernels.command import command, console, exit_with
from custom_kernels.profile.choice import Choice
from custom_kernels.profile.profiled import run_choice
from custom_kernels.profile.runs import of_backend


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Profile, or be the process that is profiled. Returns the exit status."""
    options = vars(_parser().parse_args(arguments))
    if options.pop("child"):
        options.pop("output")
        run_choice(Choice(**options))
        return 0
    run = of_backend(**options)
    screen = console(140)
    screen.print(run)
    screen.print(f"wrote {run.report}; open it with ncu-ui", soft_wrap=True, markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m custom_kernels.profile", description=__doc__)
    parser.add_argument("operation", help=f"one of {', '.join(map(str, registry.operations()))}")
    parser.add_argument("--backend", default="", help="default: the best for this device")
    parser.add_argument("--model", help="default: the last of those measured by default")
    parser.add_argument("--layer", help="default: the first of the model")
    parser.add_argument("--tokens", type=int, default=4096, help="M")
    parser.add_argument("--pattern", help="sparsity pattern; default: the first")
    parser.add_argument("--dtype", help="default: the operation's first")
    parser.add_argument("--output", type=Path, help="folder for the report")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    exit_with(main)
