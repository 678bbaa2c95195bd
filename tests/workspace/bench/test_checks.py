# SPDX-License-Identifier: Apache-2.0
"""The proofs: each passes on a sound result and catches its planted fault."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workspace.bench.samples import generation, plan, result, sparse_model
from workspace.bench import checks, loaded, provenance
from workspace.bench.messages import Generation, Result, Step
from workspace.bench.plan import Device
from workspace.pins.release import tree

TOLERANCE = checks.Tolerance(largest=0.5, mean=0.06)
VOCAB = 256


def agreement(one: Generation, other: Generation) -> checks.Agreement:
    return checks.agreement([one], [other], TOLERANCE, VOCAB)


def shifted(base: Generation, step: int, token: int, by: float) -> Generation:
    copy = base.model_copy(deep=True)
    copy.steps[step].logprobs[token] += by
    return copy


steps = st.lists(
    st.tuples(
        st.integers(0, 200),
        st.lists(st.floats(-8.0, -1.0), min_size=1, max_size=6, unique=True),
    ),
    min_size=1,
    max_size=8,
)


def drawn(values: list[tuple[int, list[float]]]) -> Generation:
    made = []
    for token, others in values:
        likely = {token: -0.1} | {token + i: v for i, v in enumerate(others, 1)}
        made.append(Step(token=token, logprobs=likely))
    return Generation(prompt=[1], steps=made)


@settings(deadline=None)  # a shared machine stalls at times
@given(steps)
def test_outputs_agree_with_themselves(values: list[tuple[int, list[float]]]) -> None:
    one = drawn(values)
    found = agreement(one, one)
    assert found.passed
    assert (found.matched, found.diverged, found.largest) == (len(values), 0, 0.0)


@settings(deadline=None)  # a shared machine stalls at times
@given(steps, st.data())
def test_agreement_is_symmetric_in_its_differences(
    values: list[tuple[int, list[float]]], data: st.DataObject
) -> None:
    one = drawn(values)
    other = drawn(data.draw(steps.filter(lambda v: len(v) == len(values))))
    left, right = agreement(one, other), agreement(other, one)
    assert left.largest == pytest.approx(right.largest)
    assert left.mean == pytest.approx(right.mean)
    assert left.matched == right.matched


def test_only_on_a_gpu_may_the_same_8_bit_weights_be_rounded_to_otherwise() -> None:
    gpu = plan(model=sparse_model("fp8"), baseline="fp8", device=Device("cuda", 1, "a GPU"))
    assert checks.tolerance(gpu, "bfloat16") == checks.EIGHT_BITS
    for other in (replace(gpu, baseline="bf16"), replace(gpu, device=plan().device)):
        assert checks.tolerance(other, "bfloat16") == checks.TOLERANCES["bfloat16"]
    for by, right in ((0.2, True), (0.6, False)):
        moved = generation()
        for step in moved.steps:
            step.logprobs = {token: value - by for token, value in step.logprobs.items()}
        found = checks.agreement([generation()], [moved], checks.EIGHT_BITS, 151936)
        assert (found.failures == []) == right


@settings(deadline=None)  # a shared machine stalls at times
@given(steps, st.data(), st.floats(0.51, 5.0), st.booleans())
def test_a_planted_difference_beyond_the_tolerance_is_caught_wherever_it_is(
    values: list[tuple[int, list[float]]], data: st.DataObject, by: float, up: bool
) -> None:
    one = drawn(values)
    step = data.draw(st.integers(0, len(one.steps) - 1))
    token = data.draw(st.sampled_from(sorted(one.steps[step].logprobs)))
    found = agreement(one, shifted(one, step, token, by if up else -by))
    assert not found.passed
    assert found.largest == pytest.approx(by)


def test_different_tokens_at_a_near_tie_are_tolerated() -> None:
    one = Generation(prompt=[1], steps=[Step(token=3, logprobs={3: -0.70, 4: -0.71, 9: -5.0})])
    other = Generation(prompt=[1], steps=[Step(token=4, logprobs={3: -0.72, 4: -0.69, 9: -5.0})])
    found = agreement(one, other)
    assert found.passed
    assert (found.matched, found.diverged, found.tokens) == (0, 1, 1)


def test_different_tokens_without_a_tie_are_a_disagreement() -> None:
    found = agreement(generation((7, 8, 9)), generation((7, 50, 9)))
    assert not found.passed
    assert "log-probabilities differ" in found.failures[0]


def test_steps_after_a_divergence_are_not_compared() -> None:
    one = generation((7, 8, 9), lead=0.01)
    other = one.model_copy(deep=True)
    other.steps[1].token = 9
    other.steps[2] = Step(token=99, logprobs={99: -0.01})
    found = agreement(one, other)
    assert found.passed
    assert (found.tokens, found.matched, found.diverged) == (2, 1, 1)


def test_a_small_error_in_every_token_is_caught_by_the_mean() -> None:
    one = generation()
    other = one.model_copy(deep=True)
    for step in other.steps:
        step.logprobs = {token: value - 0.1 for token, value in step.logprobs.items()}
    found = agreement(one, other)
    assert found.largest < TOLERANCE.largest
    assert not found.passed


def test_a_kernel_of_zeros_is_caught() -> None:
    uniform = -math.log(VOCAB)
    zeros = Generation(
        prompt=[1, 2], steps=[Step(token=0, logprobs=dict.fromkeys(range(4), uniform))] * 3
    )
    assert not agreement(generation(), zeros).passed
    # Nor do two such kernels vouch for each other.
    both = agreement(zeros, zeros)
    assert "proves nothing" in both.failures[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_a_disagreement_and_survives_the_file(value: float) -> None:
    bad = generation()
    bad.steps[0].logprobs[7] = value
    text = result(generations=[bad]).model_dump_json()
    found = agreement(generation(), Result.model_validate_json(text).generations[0])
    assert not found.passed


def test_other_prompts_or_lengths_are_a_disagreement() -> None:
    other = generation().model_copy(update={"prompt": [5]})
    assert "same prompts" in agreement(generation(), other).failures[0]
    assert not agreement(generation((7, 8)), generation((7,))).passed
    assert not checks.agreement([], [], TOLERANCE, VOCAB).passed


def test_tokens_asked_for_pass_and_any_other_number_fails() -> None:
    good = result()
    assert checks.tokens(plan(), "custom", good) == []
    for field in ("prompt_tokens", "output_tokens", "reported_tokens"):
        bad = good.model_copy(deep=True)
        setattr(bad.rounds[1], field, getattr(bad.rounds[1], field) - 1)
        assert "round 2" in checks.tokens(plan(), "custom", bad)[0]
    assert "2 rounds measured, 3 expected" in checks.tokens(plan(), "x", result((1.0, 1.0)))[0]


def test_latency_has_no_total_of_its_own() -> None:
    found = result()
    for done in found.rounds:
        done.reported_tokens = None
    assert checks.tokens(plan(metric="latency"), "custom", found) == []


def test_both_sides_must_get_the_same_prompts() -> None:
    other = result()
    other.rounds[0].prompt_tokens += 1
    assert checks.same_prompts(result(), result()) == []
    assert checks.same_prompts(result(), other) != []


def test_sources_must_not_change_during_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    before = loaded.files_hash(tmp_path)
    assert loaded.files_hash(tmp_path) == before
    (tmp_path / "a.py").write_text("22")
    newer = result().model_copy(update={"vllm_files": loaded.files_hash(tmp_path)})
    older = result().model_copy(update={"vllm_files": before})
    assert checks.unchanged([older, older], []) == []
    assert checks.unchanged([older, newer], []) == ["vLLM's sources changed during the run; re-run"]
    other_tree = newer.model_copy(update={"vllm_folder": "/trees/pristine/vllm"})
    assert checks.unchanged([older, other_tree], []) == []

    edited = result().model_copy(update={"kernels_source_hash": "1" * 64})
    assert checks.unchanged([result(), edited], [result(), result()]) == []
    assert checks.unchanged([result(), edited], [result(), edited]) == [
        "the kernels' sources changed during the run; re-run"
    ]
    upgraded = result().model_copy(update={"environment": {"vllm": "0.26"}})
    assert checks.unchanged([result(), upgraded], []) == [
        "installed versions changed during the run; re-run"
    ]


@pytest.mark.parametrize(
    ("launches", "settings", "passes"),
    [
        ({11: {"gemm.reference": 5}}, {}, True),
        ({11: {"gemm.reference": 5}}, {"backend": "reference"}, True),
        ({11: {"gemm.reference": 5}, 12: {"gemm.reference": 5}}, {"tensor_parallel": 2}, True),
        ({0: {"gemm.a": 5}, 1: {"gemm.a": 5}}, {"pipeline_parallel": 2}, True),
        ({0: {"gemm.a": 5}}, {"pipeline_parallel": 2}, False),
        ({1: {"gemm.a": 5}}, {"pipeline_parallel": 2, "layers": "lm_head"}, True),
        ({1: {"gemm.a": 5}}, {"tensor_parallel": 2, "layers": "lm_head"}, False),
        ({}, {"pipeline_parallel": 2, "layers": "lm_head"}, False),
        ({}, {}, False),
        ({11: {"gemm.reference": 0}}, {}, False),
        ({11: {"gemm.reference": 5}}, {"tensor_parallel": 2}, False),
        ({11: {"gemm.reference": 5}}, {"backend": "cublaslt"}, False),
        ({11: {"gemm.reference": 5, "gemm.cublaslt": 1}}, {"backend": "cublaslt"}, False),
        ({11: {"attention.cuda": 5}}, {}, False),
        ({11: {"rms_norm.a": 5, "gemm.b": 5}}, {"op": "rms_norm,gemm"}, True),
        ({11: {"rms_norm.a": 5, "gemm.b": 5}}, {"op": "rms_norm,gemm.b"}, True),
        ({11: {"rms_norm.a": 5, "gemm.b": 5}}, {"op": "rms_norm.b,gemm"}, False),
        ({11: {"rms_norm.a": 5, "gemm.b": 5}}, {"op": "rms_norm"}, False),
        ({11: {"rms_norm.a": 5}}, {"op": "rms_norm,gemm"}, False),
    ],
)
def test_custom_kernels_ran_in_every_worker(
    launches: dict[int, dict[str, int]], settings: dict[str, object], passes: bool
) -> None:
    found = checks.launches(plan(**settings), "custom", result(launches=launches), expected=True)
    assert (not found) == passes


@pytest.mark.parametrize(
    ("launches", "says"),
    [
        ({11: {"sparse_gemm.reference": 5, "quant_expand.reference": 5}}, None),
        ({}, "a custom kernel ran in 0 of 1 worker processes; does mine count its launches?"),
    ],
)
def test_a_quantization_method_ran_whatever_it_is_made_of(
    launches: dict[int, dict[str, int]], says: str | None
) -> None:
    made, ran = plan(quantization="mine"), result(launches=launches)
    found = checks.launches(made, "custom", ran, expected=True)
    assert (not found) if says is None else says in found[0]


def test_a_lossy_variant_may_be_anywhere_but_not_nowhere() -> None:
    far = checks.distance([generation()], [generation((7, 99, 9))], VOCAB)
    assert far.lossy
    assert far.passed
    assert (far.matched, far.tokens) == (1, 2)
    bad = generation()
    bad.steps[0].logprobs[7] = math.nan
    assert not checks.distance([generation()], [bad], VOCAB).passed


def test_what_was_imported_is_the_tree_the_kernels_and_the_environment() -> None:
    ran = result()
    expected = provenance.expected("cpu", frozenset({"torch", "os", *ran.modules}))
    assert checks.imports("stock", ran, tree(), expected) == []
    (failure,) = checks.imports("pristine", ran, Path("/trees/pristine"), expected)
    assert f"ran vllm from {tree() / 'vllm'}, not from /trees/pristine" in failure

    for module, says in (
        ({"vllm": "/elsewhere/vllm/__init__.py"}, "ran vllm from /elsewhere/vllm, not from"),
        ({"custom_kernels": "/elsewhere/custom_kernels/__init__.py"}, "ran custom_kernels from"),
        ({"torch": "/elsewhere/torch/__init__.py"}, "imported torch from /elsewhere/torch"),
        ({"os": "/elsewhere/os.py"}, "imported os from /elsewhere/os.py"),
    ):
        changed = ran.model_copy(update={"modules": ran.modules | module})
        (failure,) = checks.imports("stock", changed, tree(), expected)
        assert says in failure
    # What the environment does not have is the user's to bring.
    mine = ran.model_copy(update={"modules": ran.modules | {"mine": "/elsewhere/mine.py"}})
    assert checks.imports("stock", mine, tree(), expected) == []


def test_packages_are_at_their_locked_versions() -> None:
    expected = replace(
        provenance.expected("cpu", frozenset()), versions={"torch": "2.11.0", "triton": "3.6.0"}
    )
    ran = result().model_copy(update={"packages": {"torch": "2.11.0", "triton": "3.6.0"}})
    assert checks.imports("stock", ran, tree(), expected) == []
    for packages, says in (
        ({"torch": "2.10.0", "triton": "3.6.0"}, "torch 2.10.0 (locked: 2.11.0)"),
        ({"torch": "2.11.0"}, "triton missing (locked: 3.6.0)"),
    ):
        changed = ran.model_copy(update={"packages": packages})
        (failure,) = checks.imports("stock", changed, tree(), expected)
        assert says in failure


def test_stock_must_not_launch_anything_of_ours() -> None:
    assert checks.launches(plan(), "stock", result(), expected=False) == []
    ran = result(launches={11: {"gemm.reference": 5}})
    assert "must not" in checks.launches(plan(), "stock", ran, expected=False)[0]
