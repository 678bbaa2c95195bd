# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.tuning RECORD.json``: keep what a benchmark's record shows."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from custom_kernels.bench.records import RecordError
from custom_kernels.tuned import TuningError
from custom_kernels.tuning.adopt import adopt


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m custom_kernels.tuning RECORD.json``: keep what a benchmark's record shows."""
    parser = argparse.ArgumentParser(
        prog="python -m custom_kernels.tuning", description=main.__doc__
    )
    parser.add_argument("record", type=Path)
    parser.add_argument(
        "--output", type=Path, help="the file to write (default: the user's own for that GPU)"
    )
    options = parser.parse_args(arguments)
    try:
        lines = adopt(options.record, options.output)
    except (OSError, TuningError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader may close the pipe: `| head`
    sys.exit(main())
