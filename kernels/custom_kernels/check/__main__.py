# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.check gemm.triton``: check backends against the exact result."""

import argparse
import os
from collections.abc import Sequence

from custom_kernels import registry
from custom_kernels.check.check import check
from custom_kernels.command import command, exit_with
from custom_kernels.compile.toolchain import BuildError


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, check, print. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m custom_kernels.check", description=__doc__)
    parser.add_argument("kernel", nargs="+", help="an operation, or operation.backend")
    parser.add_argument("--dtype", help="default: all that the backend supports")
    parser.add_argument("--quick", action="store_true", help="one dtype, one set of numbers")
    parser.add_argument(
        "--bare", action="store_true", help="for tools that watch memory: no poison, no CUDA graph"
    )
    options = parser.parse_args(arguments)

    import torch

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which is later
    failures = 0
    for backend in registry.select(options.kernel):
        try:
            found = check(backend, device, options.dtype, options.quick, options.bare)
        except (registry.BackendError, BuildError) as error:
            print(f"{backend}: not checked: {error}")
            failures += isinstance(error, BuildError)
            continue
        wrong = [one for one in found if one.failure is not None]
        failures += len(wrong)
        seconds = sum(one.seconds for one in found)
        print(
            f"{backend} on {device}: {len(found) - len(wrong)} of {len(found)} cases "
            f"right, {seconds:.1f} s"
        )
        for one in wrong:
            print(f"  {one}")
    return 1 if failures else 0


if __name__ == "__main__":
    exit_with(main)
