# SPDX-License-Identifier: Apache-2.0
"""The size of a run on the CPU: options that are not set are fitted to model and machine.

The duration is estimated from how long this machine, as busy as it is now, takes to multiply a
matrix of the model's width and dtype with 1, 8 and 64 tokens. The largest of a few workloads that
fits into `FITTED_SECONDS` is chosen. An engine process takes

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
from functools import partial
from itertools import pairwise

from pydantic import BaseModel

from workspace.bench import prompts
from workspace.bench.messages import Stage, repetitions
from workspace.bench.models import Model
from workspace.bench.plan import Device, Plan, Sizes, make_plan
from workspace.bench.record import Metric
from workspace.bench.variants import COMPARED_PROMPTS, batch_limits
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT
from workspace.verbs import Bench

LIMIT_SECONDS = 460.0
"""For all processes: with measuring and the record a run takes at most 8 minutes."""
FITTED_SECONDS = 360.0
"""Limit for the estimate, lower because it is not exact."""
FEWEST_RATIOS = 6
"""Rounds over all pairs that a 95 % interval needs."""

SMALLER: dict[Metric, tuple[Sizes, ...]] = {
    "throughput": (
        Sizes(32, 32, 16, 5), Sizes(32, 16, 8, 5), Sizes(32, 16, 4, 5), Sizes(32, 8, 2, 5),
        Sizes(16, 8, 2, 3), Sizes(8, 4, 1, 3),
    ),
    "latency": (Sizes(32, 16, 1, 5), Sizes(16, 8, 1, 5), Sizes(8, 4, 1, 3)),
    "serve": (
        Sizes(32, 32, 32, 5), Sizes(32, 16, 16, 5), Sizes(32, 16, 8, 5), Sizes(32, 8, 4, 5),
        Sizes(32, 8, 2, 3), Sizes(8, 4, 1, 3),
    ),
}  # fmt: skip
"""Tried after the CPU's default, from large to small."""

# Measured with vLLM 0.25.1 on two cores of an AMD EPYC. Only the first estimate uses them; later
# estimates use the durations measured in the run.
STARTS_PER_IMPORT = 6.0
"""Importing vLLM and starting the engine, in units of the time of `import torch`."""
SERVER_IMPORTS = 2.0
"""The same with a server: it and its engine import vLLM one after the other."""
STEP_SECONDS = 0.01
"""An engine step apart from the matrix products."""
SERVED_SECONDS = 0.0005
"""A token on its way from a server's engine through HTTP to the client."""
COMPILE_SECONDS = 60.0
"""torch.compile, with EAGER=0."""
QUANTIZED_SECONDS = 1e-8
"""The reference of a quantization method, per weight and step, apart from the product."""
WEIGHTS = 2**25
MEASURED_TOKENS = (1, 8, 64)
"""Size of the measured matrix, and the numbers of tokens."""
SMALL_MODEL = 10_000_000
"""A model with fewer weights is not worth measuring: starting the engine takes longer."""


class Speed(BaseModel):
    """Speed of this machine: seconds of `import torch`, and seconds per weight to draw it and, by
    number of tokens, to multiply with it."""

    import_s: float
    draw_s: float
    product_s: dict[int, float]

    def product(self, tokens: int) -> float:
        """Seconds per weight for `tokens` at once."""
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
"""For a model whose matrix products take negligible time."""


def fit(options: Bench, device: Device, model: Model) -> tuple[Plan, dict[Stage, float]]:
    """The plan, and estimated seconds of each stage of one engine process; empty if unknown.

    On a GPU the defaults are not changed, nor is any option that was given.

    Raises:
        WorkspaceError: as `make_plan`; or this machine's speed could not be measured.
    """
    largest = make_plan(options, device, model)
    if device.kind != "cpu":
        return largest, {}
    speed = speed_of(model)
    smaller = (make_plan(options, device, model, sizes) for sizes in SMALLER[largest.metric])
    for plan in (largest, *smaller):
        expected = estimate(plan, speed)
        if (total(plan, expected) or 0.0) <= FITTED_SECONDS:
            break
    return plan, expected


def estimate(plan: Plan, speed: Speed) -> dict[Stage, float]:
    """Seconds of each stage of one engine process; for "round" and "warming up" of one round."""
    layers, head = _weights(plan.model)
    # Averaged: only half of the processes run it.
    step = partial(step_seconds, plan.model, speed, 0.5 if plan.method else 0.0)
    sequences, batched = batch_limits(plan)
    start = STARTS_PER_IMPORT * speed.import_s * (2 if plan.workers > 1 else 1)
    build = step(batched, sequences) + (0 if plan.eager else COMPILE_SECONDS)
    if plan.model.weights == "dummy":
        build += (layers + head) * speed.draw_s
    waves = math.ceil(plan.num_prompts / sequences)
    at_once = math.ceil(plan.num_prompts / waves)
    first = step(at_once * plan.input_len, at_once)
    one_round = waves * (first + (plan.output_len - 1) * step(at_once, at_once))
    if plan.metric == "serve":
        start *= SERVER_IMPORTS
        one_round += plan.output_tokens_per_round * SERVED_SECONDS
        one_round = max(one_round, plan.num_prompts / (plan.request_rate or math.inf))
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


def step_seconds(model: Model, speed: Speed, quantized: float, tokens: int, outputs: int) -> float:
    """Seconds of a step of the engine.

    Args:
        quantized: how many of the processes run the reference of a quantization method.
        tokens: in the batch.
        outputs: tokens for which the output head is multiplied.
    """
    layers, head = _weights(model)
    products = layers * speed.product(tokens) + head * speed.product(outputs)
    return STEP_SECONDS + products + layers * quantized * QUANTIZED_SECONDS


def speed_of(model: Model) -> Speed:
    """Measured, unless the model's matrix products take negligible time."""
    return measure_speed(model) if _weights(model)[0] > SMALL_MODEL else UNMEASURED


def total(plan: Plan, expected: Mapping[Stage, float]) -> float | None:
    """Seconds of all processes; None if unknown."""
    if not expected:
        return None
    one = sum(seconds * repetitions(stage, plan.rounds) for stage, seconds in expected.items())
    return 2 * plan.repeats * one


def fewest_rounds(plan: Plan) -> int:
    """Rounds of a process that a verdict needs."""
    return min(plan.rounds, math.ceil(FEWEST_RATIOS / max(2, plan.repeats)))


def measure_speed(model: Model) -> Speed:
    """Time the matrix products of `model` in a separate process, in a few seconds.

    Raises:
        WorkspaceError: that process failed.
    """
    size, dtype = str(model.config.hidden_size), model.config.torch_dtype
    command = [sys.executable, "-m", "workspace.bench.workload", size, dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise WorkspaceError(f"cannot time a matrix product with torch ({reason}); run make doctor")
    return Speed.model_validate_json(done.stdout)


def _weights(model: Model) -> tuple[int, int]:
    """Number of weights of all layers, and of the output head."""
    config = model.config
    head = config.vocab_size * config.hidden_size
    layers = 12 * config.num_hidden_layers * config.hidden_size**2  # the usual transformer
    if (known := config.parameters) is not None:
        layers = known - head * (1 if config.tie_word_embeddings else 2)
    return layers, head


def main(width: int, dtype: str) -> None:
    begin = time.perf_counter()
    import torch
    from torch.nn.functional import linear

    import_s = time.perf_counter() - begin
    # Larger than the cache, like the layers of a model one after the other.
    count = max(1, WEIGHTS // width)
    weight = torch.empty(count, width, dtype=getattr(torch, dtype, torch.bfloat16))
    begin = time.perf_counter()
    weight.normal_()
    draw_s = time.perf_counter() - begin
    product_s = {}
    for tokens in MEASURED_TOKENS:
        x = torch.ones(tokens, width, dtype=weight.dtype)
        linear(x, weight[:8])  # the first call starts the threads
        begin = time.perf_counter()
        linear(x, weight)
        product_s[tokens] = (time.perf_counter() - begin) / weight.numel()
    speed = Speed(import_s=import_s, draw_s=draw_s / weight.numel(), product_s=product_s)
    print(speed.model_dump_json())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
