# SPDX-License-Identifier: Apache-2.0
"""`make bench`: vLLM's own benchmark, two variants, one record that proves itself."""

from collections.abc import Mapping

from workspace.bench.plan import BenchOptions

__all__ = ["BenchOptions", "options", "run"]


def options(given: Mapping[str, object]) -> BenchOptions:
    """The options from the variables that were given, by their lower-case names.

    Raises:
        WorkspaceError: a value that cannot be; one line that names the variable.
    """
    return BenchOptions(**given)


def run(options: BenchOptions) -> None:
    """Resolve the model, run the variants, check, record, draw, print. See workspace.bench.runner.

    Raises:
        WorkspaceError: the run could not be made, or its result is not valid.
    """
    from workspace.bench import runner

    runner.run(options)
