# SPDX-License-Identifier: Apache-2.0
"""Small results and records as the bench makes them, for the tests of its parts."""

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from workspace.bench import checkpoint, loaded
from workspace.bench.messages import Generation, Result, Step
from workspace.bench.models import Config, Model
from workspace.bench.plan import Device, Plan
from workspace.bench.record import Round
from workspace.bench.tiny_model import CONFIG, SEED
from workspace.host.paths import KERNELS
from workspace.pins.release import tree

packages = functools.cache(loaded.packages)


def plan(**changes: Any) -> Plan:
    config = Config.model_validate(CONFIG)
    model = Model("tiny-qwen2", Path("m"), Path("t"), "random", "bundled", config, SEED)
    values: dict[str, Any] = {
        "model": model,
        "device": Device("cpu", 2, "a CPU"),
        "metric": "throughput",
        "input_len": 8,
        "output_len": 4,
        "num_prompts": 3,
        "op": None,
        "backend": None,
        "layers": None,
        "quantization": None,
        "repeats": 2,
        "rounds": 3,
        "tensor_parallel": 1,
        "eager": True,
        "baseline": "stock",
    }
    return Plan(**(values | changes))


def quantization_config(precision: str = "int8", **changes: Any) -> dict[str, Any]:
    """The entry of a converted model's config.json; an entry that is changed to None is left
    out."""
    kind = {"fp8": "float", "int8": "int"}[precision]
    numbers = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    entry: dict[str, Any] = {
        "quant_method": "sparse",
        "pattern": "2:4",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "source": {"model": "tiny-qwen2", "scores": None, "workspace": "0" * 40},
    }
    return {name: value for name, value in (entry | changes).items() if value is not None}


def sparse_model(precision: str = "int8", **changes: Any) -> Model:
    """The sample plan's model, converted."""
    config = {"quantization_config": quantization_config(precision, **changes)}
    return replace(plan().model, name="sparse", quantized=checkpoint.read(config))


def generation(tokens: tuple[int, ...] = (7, 8, 9), lead: float = 3.0) -> Generation:
    """Greedy steps over a vocabulary of 256; the choice leads the runner-up by `lead` nats."""
    return Generation(
        prompt=[1, 2],
        steps=[Step(token=t, logprobs={t: -0.2, t + 1: -0.2 - lead, t + 2: -6.0}) for t in tokens],
    )


def result(
    seconds: tuple[float, ...] = (1.0, 1.1, 0.9),
    launches: dict[int, dict[str, int]] | None = None,
    generations: list[Generation] | None = None,
    layers: dict[int, dict[str, dict[str, int]]] | None = None,
    tokens: dict[int, dict[str, dict[int, int]]] | None = None,
) -> Result:
    rounds = [
        Round(seed=i, elapsed_s=s, prompt_tokens=24, output_tokens=12, reported_tokens=36)
        for i, s in enumerate(seconds)
    ]
    return Result(
        engine_start_s=1.0,
        warm_up=rounds[:1],
        rounds=rounds,
        generations=generations or [generation()],
        launches=launches or {},
        layers=layers or {},
        tokens=tokens or {},
        kernels_source_hash="0" * 64,
        environment={"vllm": "0.25.1+cpu", "torch": "2.11.0"},
        vllm_folder="vllm",
        vllm_files="0" * 64,
        modules={
            "vllm": str(tree() / "vllm" / "__init__.py"),
            "custom_kernels": str(KERNELS / "custom_kernels" / "__init__.py"),
            "os": os.__file__,
        },
        packages=packages(),
        dtype="bfloat16",
    )
