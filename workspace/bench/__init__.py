# SPDX-License-Identifier: Apache-2.0
"""`make bench`: vLLM's own benchmark, two variants, one record that proves itself."""

from collections.abc import Mapping

from workspace.bench.plan import BenchOptions

__all__ = ["BenchOptions", "options", "run"]


def options(given: Mapping[str, object]) -> BenchOptions:
    """The options from the given variables, by their lower-case names.

    Raises:
        WorkspaceError: an invalid value; names the variable.
    """
    return BenchOptions(**given)


def run(options: BenchOptions) -> None:
    """Resolve the model, run the variants, check, record, plot, print: see workspace.bench.runner.

    Raises:
        WorkspaceError: the benchmark could not be run, or its result is not valid.
    """
    from workspace.bench import runner

    runner.run(options)
