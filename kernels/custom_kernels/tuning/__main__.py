# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.tuning RECORD.json``: keep what a benchmark's record shows."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from custom_kernels.bench.record import read
from custom_kernels.command import command, exit_with
from custom_kernels.tuning.adopt import adopt


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, adopt the record. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m custom_kernels.tuning", description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument(
        "--output", type=Path, help="the file to write (default: the user's own for that GPU)"
    )
    options = parser.parse_args(arguments)
    print("\n".join(adopt(read(options.record), options.output)))
    return 0


if __name__ == "__main__":
    exit_with(main)
