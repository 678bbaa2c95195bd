# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.compile``: compile what changed, print a line per kernel."""

import argparse
import sys

from custom_kernels.compile import build, jobs
from custom_kernels.compile.toolchain import BuildError


def main() -> int:
    """``python -m custom_kernels.compile``: compile what changed, print a line per kernel."""
    parser = argparse.ArgumentParser(
        prog="python -m custom_kernels.compile", description=main.__doc__
    )
    parser.add_argument(
        "--arch", action="append", help="for example 9.0a; repeatable (default: the pinned)"
    )
    parser.add_argument("--force", action="store_true", help="compile even what is up to date")
    arguments = parser.parse_args()

    def show(built: build.Built) -> None:
        state = "up to date"
        if built.compiled:
            state = f"compiled in {built.seconds:.1f} s, {built.peak_memory / jobs.GIB:.1f} GiB"
        print(f"{built.backend}: {state} for {', '.join(built.architectures)}")
        for kernel in built.kernels:
            spills = kernel.spill_stores + kernel.spill_loads
            print(
                f"  {kernel.name} on {kernel.architecture}: {kernel.registers} registers, "
                f"{kernel.shared} B shared, {spills} B spilled"
                + (f"; ptxas warns: {kernel.loss}" if kernel.loss else "")
            )

    try:
        build.build_all(arguments.arch, arguments.force, show)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
