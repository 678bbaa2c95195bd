# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.inspect gemm.triton``: a table of what became of every kernel."""

import argparse
import json
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict

from custom_kernels import registry
from custom_kernels.compile import sources
from custom_kernels.compile.toolchain import BuildError
from custom_kernels.inspect import reports as inspection
from custom_kernels.inspect.report import InspectionError, Report
from custom_kernels.inspect.table import table

SHOWN_NOTES = ("spills", "no tensor cores", "not deterministic")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, compile, print. Returns the exit status: 1 if a kernel does not
    compile; warnings do not count."""
    parser = argparse.ArgumentParser(
        prog="python -m custom_kernels.inspect",
        description="Registers, spills, shared memory, occupancy and instructions of every kernel.",
    )
    parser.add_argument("kernel", nargs="*", help="an operation, or operation.backend; default all")
    parser.add_argument("--arch", action="append", help="for example 9.0a; repeatable")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    options = parser.parse_args(arguments)
    wanted = [name for words in options.arch or [] for name in words.replace(",", " ").split()]
    wrong = [name for name in wanted if not re.fullmatch(r"\d+\.\d[a-z]?", name)]
    if wrong:
        print(f"error: {wrong[0]!r} is not an architecture; write 9.0a", file=sys.stderr)
        return 1

    reports: list[Report] = []
    errors: dict[str, str] = {}
    nothing: list[str] = []
    try:
        backends = registry.select(options.kernel)
    except registry.BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for backend in backends:
        try:
            found = inspection.inspect(backend, wanted or None)
        except (InspectionError, BuildError) as error:
            errors[str(backend)] = str(error)
            continue
        reports += found
        if not found:
            nothing.append(_why_nothing(backend, wanted))
    if options.json:
        document = {
            "reports": [
                asdict(one) | {"occupancy": asdict(one.occupancy) if one.occupancy else None}
                for one in reports
            ],
            "warnings": inspection.warnings(reports),
            "errors": errors,
        }
        print(json.dumps(document, indent=1))
        return 1 if errors else 0

    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    if reports:
        console.print(table(reports))
        console.print(
            "registers, stack and spills per thread, shared memory per block, in bytes; occupancy: "
            "share of an SM's warps; PTX: instructions; load and store: the widest to global "
            "memory"
        )
    for line in nothing:
        console.print(line, markup=False)
    for backend in dict.fromkeys(map(inspection.backend_of, reports)):
        for what, reason in backend.notes.items():
            if what in SHOWN_NOTES:
                console.print(f"{backend}: {what}: {reason}", markup=False)
    for line in inspection.warnings(reports):
        console.print(f"warning: {line}", style="yellow", markup=False)
    for message in errors.values():
        print(f"error: {message}", file=sys.stderr)
    return 1 if errors else 0


def _why_nothing(backend: registry.Backend, wanted: Sequence[str]) -> str:
    if backend.kind == "torch":
        return f"{backend}: torch's own kernels, nothing to inspect"
    if not backend.architectures(wanted or sources.pinned_architectures()):
        return f"{backend}: not written for {', '.join(wanted)}"
    return f"{backend}: has no kernels of its own"


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader may close the pipe: `| head`
    sys.exit(main())
