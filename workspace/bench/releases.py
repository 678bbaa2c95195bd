# SPDX-License-Identifier: Apache-2.0
"""What differs between releases of vLLM for a benchmark; all of it is here."""

from pathlib import Path


def random_lengths(tree: Path, input_len: int, output_len: int) -> list[str]:
    """Options of `vllm bench throughput` for the lengths of its random prompts.

    0.13.0 has --input-len and --output-len alone; later releases add the --random-… ones, and
    0.25.1 ignores the others without a word. So the release in `tree` is asked for what it reads.
    """
    source = (tree / "vllm" / "benchmarks" / "throughput.py").read_text()
    prefix = "--random-" if "random_input_len" in source else "--"
    return [f"{prefix}input-len", str(input_len), f"{prefix}output-len", str(output_len)]
