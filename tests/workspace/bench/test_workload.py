# SPDX-License-Identifier: Apache-2.0
"""What a CPU run measures: fitted to model and machine, what was given as it is, always an end."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.workspace.bench.samples import plan as sample
from tests.workspace.bench.samples import result
from workspace.bench import models, processes, prompts, workload
from workspace.bench.engine_run import _rounds, _warm_up
from workspace.bench.measure import measure
from workspace.bench.messages import Event, Job, Result
from workspace.bench.models import Config
from workspace.bench.plan import DEFAULTS, Device, Plan, Sizes
from workspace.bench.record import Metric, Round
from workspace.bench.variants import stock_and_custom
from workspace.bench.workload import FITTED_SECONDS, SMALLER, Speed, fit, measure_speed, total
from workspace.verbs import Bench

CPU = Device("cpu", 2, "a CPU")
TINY = sample().model
QWEN = "Qwen/Qwen2.5-0.5B"
MODEL = replace(
    TINY, name=QWEN, weights="dummy", config=Config.model_validate(models.catalogue()[QWEN])
)


def speed(slower: float) -> Speed:
    """Two quiet cores with AVX2 only are about 1."""
    product = {1: 0.4e-9 * slower, 8: 1e-9 * slower, 64: 7e-9 * slower}
    return Speed(import_s=2.5 * slower, draw_s=1e-8 * slower, product_s=product)


def fits(monkeypatch: pytest.MonkeyPatch, slower: float, options: Bench) -> tuple[Plan, float]:
    """The plan for such a machine, and how long it takes."""
    monkeypatch.setattr(workload, "measure_speed", lambda _: speed(slower))
    made, expected = fit(options, CPU, MODEL)
    return made, total(made, expected) or 0.0


def sizes(made: Plan) -> Sizes:
    return Sizes(made.input_len, made.output_len, made.num_prompts, made.rounds)


@pytest.mark.parametrize("metric", ["throughput", "latency", "serve"])
def test_a_slower_machine_gets_a_smaller_workload_that_still_gives_a_verdict(
    metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Bench(metric=metric)
    fitted = [fits(monkeypatch, slower, options) for slower in (0.001, 0.1, 1, 1.3, 1000)]
    tokens = [made.num_prompts * (made.input_len + made.output_len) for made, _ in fitted]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] > tokens[2] > tokens[-1]
    assert sizes(fitted[0][0]) == DEFAULTS["cpu", metric]
    assert sizes(fitted[-1][0]) == SMALLER[metric][-1]
    assert all(seconds <= FITTED_SECONDS for _, seconds in fitted[:-1])
    assert all(made.repeats * made.rounds >= 6 for made, _ in fitted)


def test_what_is_given_stays_and_the_rest_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    for slower in (0.001, 1, 1000):
        made, _ = fits(monkeypatch, slower, Bench(input_len=100, rounds=4))
        assert (made.input_len, made.rounds) == (100, 4)
    everything = Bench(input_len=64, output_len=33, num_prompts=7, repeats=1, rounds=1)
    made, seconds = fits(monkeypatch, 1000, everything)
    assert sizes(made) == (64, 33, 7, 1)
    assert made.repeats == 1
    assert seconds > FITTED_SECONDS


def test_a_quantization_whose_reference_is_slow_gets_less(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = fits(monkeypatch, 0.5, Bench())
    quantized, _ = fits(monkeypatch, 0.5, Bench(quantization="sparse_2_4"))
    assert quantized.output_len < plain.output_len


def test_the_tiny_model_is_not_measured_and_a_gpu_keeps_its_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workload, "measure_speed", lambda _: pytest.fail("measured"))
    made, expected = fit(Bench(), CPU, TINY)
    assert sizes(made) == DEFAULTS["cpu", "throughput"]
    assert 30 < (total(made, expected) or 0) < 180
    on_gpu, expected = fit(Bench(), Device("cuda", 1, "a GPU"), MODEL)
    assert on_gpu.num_prompts == DEFAULTS["cuda", "throughput"].num_prompts
    assert total(on_gpu, expected) is None


def test_a_model_of_an_unknown_architecture_is_estimated_too() -> None:
    known = workload._weights(MODEL)
    unknown = replace(MODEL, config=MODEL.config.model_copy(update={"model_type": "mine"}))
    assert workload._weights(unknown)[1] == known[1]
    assert 0.5 < workload._weights(unknown)[0] / known[0] < 2


def test_this_machine_is_measured() -> None:
    found = measure_speed(TINY)
    assert min(found.import_s, found.draw_s, *found.product_s.values()) > 0
    assert found.product(640) == pytest.approx(10 * found.product(64))
    low, high = sorted((found.product(8), found.product(64)))
    assert low <= found.product(30) <= high


def test_short_requests_compare_fewer_tokens() -> None:
    counts = [prompts.new_tokens(sample(output_len=length)) for length in (1, 16, 500)]
    assert counts == [8, 16, 24]


SECONDS = 0.02


class Engine:
    """Rounds that take at least `SECONDS`."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def report(self, event: Event) -> None:
        self.steps.append(str(event))

    def round(self, seed: int) -> Round:
        time.sleep(SECONDS)
        # Each is twice as fast as the one before: warming up has no end.
        elapsed = SECONDS / 2 ** len(self.steps)
        return Round(
            seed=seed, elapsed_s=elapsed, prompt_tokens=1, output_tokens=1, reported_tokens=2
        )


def job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "rounds": 10,
        "fewest_rounds": 3,
        "seed": 1,
        "new_tokens": 1,
        "top": 1,
    }
    return Job(
        metric="throughput", arguments=[], prompts=[[1]], launches=Path("l"), folder=Path("f"),
        **(values | changes),
    )  # fmt: skip


def test_rounds_end_with_the_time_but_not_before_a_verdict() -> None:
    def seeds(deadline: float) -> list[int]:
        engine = Engine()
        done = _rounds(job(), engine.round, engine.report, deadline)
        assert engine.steps == [f"round {i + 1} of 10" for i in range(len(done))]
        return [one.seed for one in done]

    assert seeds(math.inf) == list(range(2, 12))
    assert seeds(0.0) == [2, 3, 4]
    some = seeds(time.monotonic() + 5 * SECONDS)
    assert 3 <= len(some) <= 5
    assert some == list(range(2, 2 + len(some)))


def test_warming_up_leaves_time_for_the_rounds() -> None:
    for deadline, rounds in ((math.inf, 8), (0.0, 2)):
        engine = Engine()
        assert (
            len(_warm_up(job(), engine.round, engine.round(1), engine.report, deadline)) == rounds
        )


def test_where_time_is_short_all_processes_count_the_same_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With processes that manage 5, 4, 3 and 5 rounds in their share of the time."""
    asked: list[Job] = []

    def run(job: Job, *_: object) -> Result:
        asked.append(job)
        manages = min(job.rounds, (5, 4, 3, 5)[len(asked) - 1])
        return result(tuple(range(1, manages + 1)))

    monkeypatch.setattr(processes, "run", run)
    made = sample(rounds=5)
    sides = stock_and_custom(made)
    changed, done = measure(made, sides, {}, folder=tmp_path, logs=tmp_path, limit=400.0)
    assert changed == replace(made, rounds=3)
    assert [[r.elapsed_s for r in ran.result.rounds] for ran in done] == [[1, 2, 3]] * 4
    assert [job.rounds for job in asked] == [5, 5, 4, 3]
    assert all(job.fewest_rounds == 3 for job in asked)
    shares = [job.seconds for job in asked]
    assert shares == pytest.approx([100, 400 / 3, 200, 400], abs=10)
    asked.clear()
    measure(made, sides, {}, folder=tmp_path, logs=tmp_path, limit=None)
    assert [job.seconds for job in asked] == [None] * 4
