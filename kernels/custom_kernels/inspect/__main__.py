# SPDX-License-Identifier: Apache-2.0
"""``python -m custom_kernels.inspect gemm.triton``: a table of what became of every kernel."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict

from custom_kernels import registry
from custom_kernels.command import UsageError, command, console, exit_with
from custom_kernels.compile import sources
from custom_kernels.compile.toolchain import BuildError
from custom_kernels.inspect import reports as inspection
from custom_kernels.inspect.report import InspectionError, Report
from custom_kernels.inspect.table import table

SHOWN_NOTES = ("spills", "no tensor cores", "not deterministic")


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, compile, print. Returns the exit status: 1 if a kernel does not
    compile; warnings do not count."""
    parser = argparse.ArgumentParser(
        prog="python -m custom_kernels.inspect",
        description="Registers, spills, shared memory, occupancy and instructions of every kernel.",
    )
    parser.add_argument("kernel", nargs="*", help="an operation, or operation.backend; default all")
    parser.add_argument("--arch", action="append", help="for example 9.0a; repeatable")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    wanted = " ".join(options.arch or []).replace(",", " ").split()
    for name in wanted:
        if not re.fullmatch(r"\d+\.\d[a-z]?", name):
            raise UsageError(f"{name!r} is not an architecture; use e.g. 9.0a")

    reports: list[Report] = []
    errors: dict[str, str] = {}
    empty: list[str] = []
    for backend in registry.select(options.kernel):
        try:
            found = inspection.inspect(backend, wanted or None)
        except (InspectionError, BuildError) as error:
            errors[str(backend)] = str(error)
            continue
        reports += found
        if not found:
            empty.append(_why_empty(backend, wanted))
    warnings = inspection.warnings(reports)
    if options.json:
        occupied = ((one, one.occupancy) for one in reports)
        documents = [asdict(one) | {"occupancy": held and asdict(held)} for one, held in occupied]
        print(json.dumps({"reports": documents, "warnings": warnings, "errors": errors}, indent=1))
        return 1 if errors else 0

    screen = console(170)
    if reports:
        screen.print(table(reports))
        screen.print(
            "registers, stack and spills per thread, shared memory per block, in bytes; occupancy: "
            "share of an SM's warps; PTX: instructions; load and store: the widest to global "
            "memory"
        )
    for line in empty:
        screen.print(line, markup=False)
    for backend in dict.fromkeys(map(inspection.backend_of, reports)):
        for what, reason in backend.notes.items():
            if what in SHOWN_NOTES:
                screen.print(f"{backend}: {what}: {reason}", markup=False)
    for line in warnings:
        screen.print(f"warning: {line}", style="yellow", markup=False)
    for message in errors.values():
        print(f"error: {message}", file=sys.stderr)
    return 1 if errors else 0


def _why_empty(backend: registry.Backend, wanted: Sequence[str]) -> str:
    if backend.kind == "torch":
        return f"{backend}: torch's own kernels, nothing to inspect"
    if not backend.architectures(wanted or sources.pinned_architectures()):
        return f"{backend}: not written for {', '.join(wanted)}"
    return f"{backend}: defines no kernels"


if __name__ == "__main__":
    exit_with(main)
