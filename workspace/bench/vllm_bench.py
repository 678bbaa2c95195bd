# SPDX-License-Identifier: Apache-2.0
"""vLLM's own `vllm bench METRIC`, called in this process."""

import importlib
from collections.abc import Sequence

from workspace.bench.record import Metric

COMMANDS: dict[Metric, str] = {
    "throughput": "BenchmarkThroughputSubcommand",
    "latency": "BenchmarkLatencySubcommand",
    "serve": "BenchmarkServingSubcommand",
}
"""The class of each command in vLLM's module of that name."""


def run(metric: Metric, arguments: Sequence[str]) -> None:
    """Parse the arguments with vLLM's own parser and call the command's entry point."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    module = importlib.import_module(f"vllm.entrypoints.cli.benchmark.{metric}")
    command = getattr(module, COMMANDS[metric])
    parser = FlexibleArgumentParser(prog=f"vllm bench {metric}")
    command.add_cli_args(parser)
    command.cmd(parser.parse_args(arguments))
