# SPDX-License-Identifier: Apache-2.0
"""How large a run on the CPU is: what was not given is fitted to the model and to this machine.

What a run takes is estimated from how long this machine, as busy as it is now, multiplies a matrix
of the model's width and dtype with 1, 8 and 64 tokens. The largest of a few workloads that fits
into `FITTED_SECONDS` is taken. An engine process takes

    start + T(engine's own warm-up) + (warm-up rounds + rounds) · round + comparison,
    round = T(all prompts) + (OUTPUT_LEN - 1) · T(one token of each prompt)

where T(m) is a step of the whole model on m tokens. Run as `python -m workspace.bench.workload
WIDTH DTYPE` it measures and prints `Speed` as JSON.
"""

import math
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import pairwise

from pydantic import BaseModel

from workspace.bench import prompts
from workspace.bench.engine_run import WARM_ROUNDS, Stage
from workspace.bench.models import Model, parameters
from workspace.bench.plan import BenchOptions, Device, Metric, Plan, Sizes, plan
from workspace.bench.variants import COMPARED_PROMPTS, batch_limits
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT

LIMIT_SECONDS = 460.0
"""For all processes: with measuring and the record a run takes at most 8 minutes."""
FITTED_SECONDS = 360.0
"""What the estimate may come to: it is not exact."""
FEWEST_RATIOS = 6
"""Rounds of all pairs that an interval of 95 % needs."""

SMALLER: dict[Metric, tuple[Sizes, ...]] = {
    "throughput": (
        {"input_len": 32, "output_len": 32, "num_prompts": 16, "rounds": 5},
        {"input_len": 32, "output_len": 16, "num_prompts": 8, "rounds": 5},
        {"input_len": 32, "output_len": 16, "num_prompts": 4, "rounds": 5},
        {"input_len": 32, "output_len": 8, "num_prompts": 2, "rounds": 5},
        {"input_len": 16, "output_len": 8, "num_prompts": 2, "rounds": 3},
        {"input_len": 8, "output_len": 4, "num_prompts": 1, "rounds": 3},
    ),
    "latency": (
        {"input_len": 32, "output_len": 16, "num_prompts": 1, "rounds": 5},
        {"input_len": 16, "output_len": 8, "num_prompts": 1, "rounds": 5},
        {"input_len": 8, "output_len": 4, "num_prompts": 1, "rounds": 3},
    ),
}  # fmt: skip
"""What is tried after the default of the CPU, from large to small."""

# Measured with vLLM 0.25.1 on two cores of an AMD EPYC; only the first estimate rests on them,
# the time left is that of what the run itself has measured since.
STARTS_PER_IMPORT = 6.0
"""Importing vLLM and starting the engine, by the time that `import torch` takes."""
STEP_SECONDS = 0.01
"""What a step of the engine takes beside the matrix products."""
COMPILE_SECONDS = 60.0
"""torch.compile, with EAGER=0."""
QUANTIZED_SECONDS = 1e-8
"""What the reference of a quantization method takes for a weight in a step, beside the product."""
WEIGHTS = 2**25
MEASURED_TOKENS = (1, 8, 64)
"""The matrix that is multiplied, and with how many tokens at once."""
SMALL_MODEL = 10_000_000
"""A model with fewer weights is not worth measuring: starting the engine takes longer."""


class Speed(BaseModel):
    """How fast this machine is: `import torch` in seconds, and seconds per weight of a layer, to
    draw it and to multiply so many tokens with it."""

    import_s: float
    draw_s: float
    product_s: dict[int, float]

    def product(self, tokens: int) -> float:
        """Seconds per weight for so many tokens at once."""
        known = sorted(self.product_s.items())
        (least, first), (most, last) = known[0], known[-1]
        if tokens <= least:
            return first
        if tokens >= most:
            return last * tokens / most
        return next(
            low + (high - low) * (tokens - a) / (b - a)
            for (a, low), (b, high) in pairwise(known)
            if tokens <= b
        )


UNMEASURED = Speed(import_s=3.0, draw_s=0.0, product_s={1: 0.0})
"""For a model whose matrix products take no time to speak of."""


def fit(options: BenchOptions, device: Device, model: Model) -> tuple[Plan, dict[Stage, float]]:
    """The plan, and seconds of each stage of one engine process; none where only a first process
    can tell.

    On a GPU the defaults stay as they are. What was given is taken as it is.

    Raises:
        WorkspaceError: as `plan`; or this machine's speed could not be measured.
    """
    largest = plan(options, device, model)
    if device.kind != "cpu":
        return largest, {}
    speed = measure(model) if _weights(model)[0] > SMALL_MODEL else UNMEASURED
    smaller = (plan(options, device, model, sizes) for sizes in SMALLER[largest.metric])
    for made in (largest, *smaller):
        expected = estimate(made, speed)
        if (total(made, expected) or 0.0) <= FITTED_SECONDS:
            break
    return made, expected


def estimate(plan: Plan, speed: Speed) -> dict[Stage, float]:
    """Seconds of each stage of one engine process; for "round" and "warming up" of one round."""
    layers, head = _weights(plan.model)

    # Half of the processes run it; the other half has that much less to do.
    quantized = QUANTIZED_SECONDS / 2 if plan.quantization else 0.0

    def step(tokens: int, sequences: int) -> float:
        products = layers * speed.product(tokens) + head * speed.product(sequences)
        return STEP_SECONDS + products + layers * quantized

    sequences, batched = batch_limits(plan)
    start = STARTS_PER_IMPORT * speed.import_s * (2 if plan.tp > 1 else 1)
    build = step(batched, sequences) + (0 if plan.eager else COMPILE_SECONDS)
    if plan.model.weights == "dummy":
        build += (layers + head) * speed.draw_s
    waves = math.ceil(plan.num_prompts / sequences)
    at_once = math.ceil(plan.num_prompts / waves)
    first = step(at_once * plan.input_len, at_once)
    one_round = waves * (first + (plan.output_len - 1) * step(at_once, at_once))
    compared = step(sum(prompts.PROMPT_LENGTHS), COMPARED_PROMPTS)
    compared += (prompts.new_tokens(plan) - 1) * step(COMPARED_PROMPTS, COMPARED_PROMPTS)
    return {
        "importing vLLM": start / 2,
        "starting the engine": start / 2 + build,
        "warming up": one_round,
        "round": one_round,
        "comparing outputs": compared,
        "stopping": 1.0,
    }


def total(plan: Plan, expected: Mapping[Stage, float]) -> float | None:
    """Seconds of all processes; None where nothing is known of them."""
    if not expected:
        return None
    repeated = {"warming up": WARM_ROUNDS[0], "round": plan.rounds}
    one = sum(seconds * repeated.get(stage, 1) for stage, seconds in expected.items())
    return 2 * plan.repeats * one


def fewest_rounds(plan: Plan) -> int:
    """Rounds of a process without which there is no verdict."""
    return min(plan.rounds, math.ceil(FEWEST_RATIOS / max(2, plan.repeats)))


def measure(model: Model) -> Speed:
    """Time the matrix products of `model` in a process of its own, in a few seconds.

    Raises:
        WorkspaceError: that process failed; its last line.
    """
    dtype = str(model.config.get("torch_dtype") or model.config.get("dtype"))
    command = [sys.executable, "-m", "workspace.bench.workload", str(_width(model)), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise WorkspaceError(f"cannot time a matrix product with torch ({reason}); run make doctor")
    return Speed.model_validate_json(done.stdout)


def _width(model: Model) -> int:
    return int(model.config["hidden_size"])


def _weights(model: Model) -> tuple[int, int]:
    """Weights of all layers, which every token is multiplied with, and of the output head."""
    width = _width(model)
    head = int(model.config["vocab_size"]) * width
    layers = 12 * int(model.config["num_hidden_layers"]) * width**2  # the usual transformer
    if (known := parameters(model.config)) is not None:
        layers = known - head * (1 if model.config.get("tie_word_embeddings") else 2)
    return layers, head


def main(width: int, dtype: str) -> None:
    begin = time.perf_counter()
    import torch
    from torch.nn.functional import linear

    import_s = time.perf_counter() - begin
    # Large enough to come from memory, as the layers of a model do, one after the other.
    count = max(1, WEIGHTS // width)
    weight = torch.empty(count, width, dtype=getattr(torch, dtype, torch.bfloat16))
    begin = time.perf_counter()
    weight.normal_()
    draw_s = time.perf_counter() - begin
    product_s = {}
    for tokens in MEASURED_TOKENS:
        x = torch.ones(tokens, width, dtype=weight.dtype)
        linear(x, weight[:8])  # the first call makes the threads
        begin = time.perf_counter()
        linear(x, weight)
        product_s[tokens] = (time.perf_counter() - begin) / weight.numel()
    speed = Speed(import_s=import_s, draw_s=draw_s / weight.numel(), product_s=product_s)
    print(speed.model_dump_json())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
