# SPDX-License-Identifier: Apache-2.0
"""Where things live in a checkout. Nothing else spells these paths out."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "pins.toml"
LOCKS = ROOT / "locks"
KERNELS = ROOT / "kernels"
FORK = ROOT / "vllm-fork"
FORK_SRC = FORK / "src"
PATCHES = FORK / "patches"
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
STATE = ROOT / ".workspace"
"""What the workspace makes and can make again: tools, logs, compiled kernels, models."""
