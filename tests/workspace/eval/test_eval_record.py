# SPDX-License-Identifier: Apache-2.0
"""The record of `make eval`: complete, readable again, shown; invalid when a proof failed."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.workspace.bench import samples
from workspace.bench.plan import Device
from workspace.bench.record import write
from workspace.bench.variants import baseline, custom
from workspace.eval import report
from workspace.eval.evaluate import evaluate
from workspace.eval.messages import Scores
from workspace.eval.plan import Evaluation, Side
from workspace.eval.record import Record
from workspace.eval.text import Text

RAN: dict[str, Any] = {
    "launches": {11: {"sparse_gemm.reference": 6}},
    "layers": {11: {"down_proj": {"sparse_gemm.reference": 3}}},
    "tokens": {11: {"sparse_gemm.reference": {64: 6}}},
}


def make(
    change: Callable[[Scores, Scores], None] = lambda *_: None, loss: float = 0.5, **settings: Any
) -> Record:
    """The record of a sparse model against its dense weights, after `change` to what both scored.

    Args:
        loss: nats per token.
    """
    sparse = replace(samples.sparse_model(), converted_from=samples.plan().model)
    plan = samples.plan(**{"model": sparse, "baseline": "bf16"} | settings)
    against, model = replace(baseline(plan), name="against"), replace(custom(plan), name="model")
    windows = [[1] * 200, [2] * 100]
    evaluation = Evaluation(
        Side("against", plan, against), Side("model", plan, model),
        Text("a text", "words"), 300, 200, windows, 1, {}, "make eval MODEL=sparse",
    )  # fmt: skip
    ran = dict(samples.result())
    common = {name: ran[name] for name in Scores.model_fields if name in ran}
    old = [[-2.0] * 199, [-3.0] * 99]
    new = [[value - loss for value in window] for window in old]
    scores = Scores(**common, logprobs=old), Scores(**(common | RAN), logprobs=new)
    change(*scores)
    return evaluate(evaluation, *scores, "20261127-sparse-eval", datetime.now(UTC), load=0.1)


def test_a_sound_run_is_valid_and_its_ratio_is_that_of_the_perplexities(tmp_path: Path) -> None:
    made = make()
    assert (made.valid, made.failures) == (True, [])
    assert made.model.nats - made.against.nats == pytest.approx(0.5)
    assert made.comparison.ratio == pytest.approx(made.model.perplexity / made.against.perplexity)
    assert (made.text.tokens, made.text.windows) == (300, 2)
    assert (made.model.quantized, made.against.quantized) == ("2:4 int8", None)
    write(made, tmp_path / "r.json")
    assert Record.model_validate_json((tmp_path / "r.json").read_text()) == made
    console = Console(width=120, record=True)
    console.print(report.table(made), *report.lines(made), sep="\n")
    shown = console.export_text()
    for words in ("perplexity of a text, 300 tokens in 2 windows of 200, a CPU, TP 1",
                  "against: none", "model: sparse_gemm.reference: 6 in 1 process",
                  "model / against = 1.6487 [1.6487, 1.6487]: worse"):  # fmt: skip
        assert words in shown


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _, new: new.launches.clear(), "model: a custom kernel ran in 0 of 1 worker"),
        (lambda old, _: old.launches.update(RAN["launches"]), "against: launched custom kernels"),
        (lambda _, new: new.layers[11].update(up_proj={}), "model: layer up_proj did not run"),
        (
            lambda _, new: new.logprobs[1].__setitem__(3, float("-inf")),
            "model: the log-probability",
        ),
        (
            lambda _, new: new.modules.update(vllm="/elsewhere/vllm.py"),
            "model: ran vllm from /else",
        ),
        (lambda _, new: new.environment.update(torch="1"), "installed versions changed during"),
    ],
)
def test_a_failed_proof_makes_it_invalid(
    change: Callable[[Scores, Scores], None], says: str
) -> None:
    made = make(change)
    assert not made.valid
    assert any(failure.startswith(says) for failure in made.failures)


def test_the_same_weights_have_to_give_the_same_probabilities() -> None:
    assert make(loss=0.01, baseline="int8").valid
    differs = make(loss=0.1, baseline="int8")
    assert not differs.valid
    assert "differ by 0.1 in the log-probability of a token on average" in differs.failures[0]
    # What vLLM multiplies inexactly proves nothing.
    old = make(loss=0.1, baseline="int8", device=Device("cpu", 2, "a CPU", exact_int8=False))
    assert old.valid
    assert "no VNNI" in old.note
