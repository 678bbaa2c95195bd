# SPDX-License-Identifier: Apache-2.0
"""The harness that times kernels: its bookkeeping, its poison, and that it cannot be fooled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from custom_kernels.bench import device as bench_device
from custom_kernels.bench import timing
from custom_kernels.bench.record import ClockState, Failed, Timed
from custom_kernels.bench.timing import measure
from custom_kernels.check import outputs
from custom_kernels.check.case import Case, Contender
from hypothesis import given, settings
from hypothesis import strategies as st

CPU = torch.device("cpu")
ON = [CPU, pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)]
POISONED = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
]


def doubled(rows: int = 64, columns: int = 256, **changes: Any) -> Case:
    """y = 2 · x, which float32 does exactly."""

    def empty_inputs(device: torch.device) -> tuple[Any, ...]:
        return (torch.empty(rows, columns, device=device),)

    case = Case(
        labels={"layer": "doubled", "M": rows},
        empty_inputs=empty_inputs,
        fill=lambda inputs: inputs[0].normal_(),
        flops=float(rows * columns),
        bytes=8.0 * rows * columns,
        tolerance=1e-6,
    )
    return replace(case, **changes)


def exact(x: torch.Tensor) -> torch.Tensor:
    return 2 * x.double()


def right(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def wrong(x: torch.Tensor) -> torch.Tensor:
    return 2.001 * x


def half_written(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out[:-1] = 2 * x[:-1]
    return out


class Remembering:
    """Computes each output once, and gives it back whatever the inputs have become."""

    def __init__(self, copies: bool) -> None:
        self.copies = copies
        self.known: dict[int, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in self.known:
            self.known[x.data_ptr()] = 2 * x
        known = self.known[x.data_ptr()]
        return torch.empty_like(x).copy_(known) if self.copies else known


def broken(x: torch.Tensor) -> torch.Tensor:
    raise ValueError("no such tile\nand more about it")


def run_one(run: Callable[..., Any], device: torch.device = CPU, **changes: Any) -> Timed | Failed:
    case = doubled(**changes)
    contenders = [Contender("right", right), Contender("other", run)]
    return measure(case, contenders, exact, device, seconds=0.01).contenders["other"]


# --- bookkeeping ----------------------------------------------------------------------------------


@given(st.lists(st.text(), min_size=1, max_size=6, unique=True))
def test_blocks_are_palindromes_with_everyone_twice(names: list[str]) -> None:
    order = timing.palindrome(names)
    assert order == order[::-1]
    assert all(order.count(name) == 2 for name in names)
    assert order[: len(names)] == names


@given(
    drift=st.floats(0, 0.1), blocks=st.integers(1, 9), cost=st.lists(st.floats(1, 9), min_size=2)
)
def test_a_steady_drift_cancels_within_a_block(
    drift: float, blocks: int, cost: list[float]
) -> None:
    names = [str(i) for i in range(len(cost))]
    order = [name for _ in range(blocks) for name in timing.palindrome(names)]
    elapsed = [(name, cost[int(name)] + drift * place) for place, name in enumerate(order)]
    means = timing.per_block(elapsed, blocks)
    for block in range(blocks):
        added = [means[name][block] - cost[int(name)] for name in names]
        assert max(added) - min(added) < 1e-9  # the same for all


def test_times_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="3 times are not 2 blocks"):
        timing.per_block([("a", 1.0)] * 3, 2)


@pytest.mark.parametrize(
    ("low", "high", "blocks", "repetitions", "verdict"),
    [
        (1.011, 1.2, 9, (1.1, 1.1), "faster"),
        (0.8, 0.989, 9, (0.9, 0.9), "slower"),
        (0.981, 1.019, 9, (), "same"),
        (1.005, 1.015, 9, (), "same"),
        (0.99, 1.03, 9, (), "ambiguous"),
        (1.005, 1.3, 9, (), "ambiguous"),
        (1.011, 1.2, 5, (1.1,), "ambiguous"),  # too few for an interval
        (1.011, 1.2, 9, (1.1, 0.99), "ambiguous"),  # a repetition disagrees
        (0.8, 0.98, 9, (0.9, 1.01), "ambiguous"),
    ],
)
def test_verdicts(
    low: float, high: float, blocks: int, repetitions: Sequence[float], verdict: str
) -> None:
    assert timing.verdict(low, high, blocks, repetitions) == verdict


def test_ratios_are_taken_block_by_block() -> None:
    base = [[10.0, 20.0, 40.0], [80.0, 160.0, 320.0]]  # the machine slows down all the time
    own = [[time / 1.25 for time in repetition] for repetition in base]
    result = timing.compare(own, base, 0.0, doubled())
    assert result.ratio == result.low == result.high == 1.25
    assert result.repetitions == [1.25, 1.25]
    assert result.verdict == "faster"
    assert result.p20 < result.us < result.p80
    assert timing.compare(base, None, 0.0, doubled()).ratio is None


def test_a_replay_is_made_long_enough_but_not_endless() -> None:
    assert timing.rounds_for([1.0]) == 1
    assert timing.rounds_for([timing.REPLAY_SECONDS / 3, 1.0]) == 3
    assert timing.rounds_for([1e-9]) == timing.rounds_for([0.0]) == timing.MAX_ROUNDS
    assert timing.rounds_for([]) == 1


# --- poison ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", POISONED, ids=str)
def test_poison_is_seen_until_the_last_element_is_written(dtype: torch.dtype) -> None:
    out = torch.empty(7, 5, dtype=dtype)
    outputs.poison(out)
    assert outputs.unwritten(out) == 35
    if dtype.is_floating_point:
        assert torch.isnan(out.float()).all()
    out.copy_(torch.ones(7, 5))
    assert outputs.unwritten(out) == 0
    outputs.poison(out[3, 2])
    assert outputs.unwritten((out, [out.clone()])) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_computed_nan_is_no_poison(dtype: torch.dtype) -> None:
    infinite = torch.full((9,), math.inf, dtype=dtype)
    assert outputs.unwritten(infinite - infinite) == 0
    assert outputs.unwritten(torch.full((9,), math.nan, dtype=dtype)) == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_other_dtypes_get_an_unlikely_value(dtype: torch.dtype) -> None:
    out = torch.zeros(3, dtype=dtype)
    outputs.poison(out)
    assert out.ne(0).all()
    assert outputs.unwritten(out) == 0  # it cannot be told from a result


def test_poison_reaches_strided_outputs_and_leaves_the_rest() -> None:
    whole = torch.zeros(4, 6, dtype=torch.bfloat16)
    outputs.poison(whole[:, ::2])
    assert outputs.unwritten(whole) == 12
    assert outputs.unwritten(whole[:, 1::2]) == 0


def test_memory_is_poisoned_where_python_allocates_it() -> None:
    like = torch.ones(3, dtype=torch.int8)
    with outputs.PoisonedMemory():
        made = [torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.zeros(3)]
    assert [outputs.unwritten(out) for out in made] == [3, 3, 3, 0]


# --- what cannot fool it --------------------------------------------------------------------------


@pytest.mark.parametrize("device", ON, ids=str)
@pytest.mark.parametrize(
    ("run", "failure"),
    [
        (wrong, "error 5.0e-04, 1.0e-06 is allowed"),
        (half_written, "256 elements of the output were not written"),
        (broken, "ValueError: no such tile"),
        (lambda x: (2 * x)[:, :-1], "the output has shape [64, 255]"),
        (lambda x: 2 * x / torch.zeros_like(x), "elements that are not finite"),
        (torch.zeros_like, "error 1.0e+00"),
    ],
    ids=["wrong", "half written", "raises", "another shape", "infinite", "zeros"],
)
def test_a_kernel_that_is_not_right_gets_no_time(
    device: torch.device, run: Callable[..., Any], failure: str
) -> None:
    result = run_one(run, device)
    assert isinstance(result, Failed)
    assert failure in result.failure


@pytest.mark.parametrize("device", ON, ids=str)
@pytest.mark.parametrize("copies", [True, False], ids=["copied", "as it is"])
def test_a_remembered_result_is_found_since_inputs_change(
    device: torch.device, copies: bool
) -> None:
    result = run_one(Remembering(copies), device)
    assert isinstance(result, Failed)
    assert "error" in result.failure or "not written" in result.failure


def test_a_kernel_that_goes_wrong_while_it_is_timed_gets_no_time() -> None:
    calls = 0

    def tiring(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return right(x) if calls < 40 else wrong(x)

    result = run_one(tiring)
    assert isinstance(result, Failed)
    assert "error 5.0e-04" in result.failure


@pytest.mark.parametrize("device", ON, ids=str)
def test_one_failure_does_not_stop_the_others(device: torch.device) -> None:
    def not_here(_: torch.device) -> str | None:
        return "it needs a machine of its own"

    def too_large(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(2**50, device=x.device)

    contenders = [
        Contender("right", right),
        Contender("broken", broken),
        Contender("too large", too_large),
        Contender("elsewhere", right, unavailable_reason=not_here),
        Contender("packed", lambda x: x, prepare=lambda inputs: [broken(*inputs)]),
        Contender("also right", lambda x: x + x),
    ]
    row = measure(doubled(), contenders, exact, device, seconds=0.01)
    assert list(row.contenders) == [contender.name for contender in contenders]
    assert row.contenders["elsewhere"] == Failed(failure="it needs a machine of its own")
    for name in ("broken", "packed"):
        assert row.contenders[name] == Failed(failure="ValueError: no such tile")
    assert isinstance(row.contenders["too large"], Failed)
    baseline, other = row.timed("right"), row.timed("also right")
    assert baseline is not None
    assert other is not None
    assert baseline.error == other.error == 0
    assert other.ratio is not None


def test_without_its_baseline_a_contender_has_times_but_no_ratio() -> None:
    contenders = [Contender("base", broken), Contender("ours", right)]
    ours = measure(doubled(), contenders, exact, CPU, seconds=0.01).timed("ours")
    assert ours is not None
    assert ours.ratio is ours.verdict is None


def test_contenders_have_names_of_their_own() -> None:
    contenders: list[Contender]
    for contenders in ([], [Contender("a", right), Contender("a", wrong)]):
        with pytest.raises(ValueError, match="distinct names"):
            measure(doubled(), contenders, exact, CPU)


@pytest.mark.parametrize("device", ON, ids=str)
def test_what_prepare_makes_follows_the_inputs(device: torch.device) -> None:
    """A packed weight, say, is made of other numbers when results are checked again."""
    made = []

    def prepare(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        made.append(2 * inputs[0])
        return [made[-1]]

    contenders = [Contender("right", right), Contender("packed", torch.clone, prepare)]
    row = measure(doubled(), contenders, exact, device, seconds=0.01)
    assert row.timed("packed")
    # Once per set, then for the two checks of the first and the last set.
    assert len(made) == row.input_sets + 2 * 2


def test_a_case_can_bring_its_own_error_for_outputs_of_any_kind() -> None:
    def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.round().clamp(-127, 127).to(torch.int8), x.amax(1)

    def error(inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> float:
        wanted = rounded(*inputs)
        return float(sum((a != b).sum() for a, b in zip(outputs, wanted, strict=True)))

    def off(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, scale = rounded(x)
        q[5, 7] += 1
        return q, scale

    def forgotten(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, scale = rounded(x)
        out = torch.empty_like(q)
        out[:, 1:] = q[:, 1:]
        return out, scale

    case = doubled(error=error, tolerance=0)
    contenders = [Contender(run.__name__, run) for run in (rounded, off, forgotten)]
    row = measure(case, contenders, exact, CPU, seconds=0.01)
    assert row.timed("rounded")
    assert row.contenders["off"] == Failed(failure="error 1.0e+00, 0.0e+00 is allowed")
    unwritten = "64 elements of the output were not written"
    assert row.contenders["forgotten"] == Failed(failure=unwritten)


def test_an_error_that_is_no_number_never_passes() -> None:
    result = run_one(right, error=lambda inputs, outputs: math.nan, tolerance=math.inf)
    assert isinstance(result, Failed)
    assert "error nan" in result.failure


def test_a_tuple_is_compared_with_a_tuple() -> None:
    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * x, 3 * x

    def second_wrong(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * x, 3.1 * x

    def exactly(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * x.double(), 3 * x.double()

    contenders = [Contender("both", both), Contender("second wrong", second_wrong)]
    row = measure(doubled(), contenders, exactly, CPU, seconds=0.01)
    assert row.timed("both")
    assert "error 3.3e-02" in str(row.contenders["second wrong"])


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 200))
def test_any_number_of_rows_is_checked(rows: int) -> None:
    x = torch.randn(rows, 3)
    assert outputs.error_of(doubled(), (x,), 2 * x, exact) == 0
    for place in {0, rows - 1} if rows else set():
        out = 2 * x
        out[place] += 1
        with pytest.raises(outputs.WrongResultError):
            outputs.error_of(doubled(), (x,), out, exact)


# --- clocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clocks", "warnings"),
    [
        ([{"sm_mhz": [1900, 1980], "reasons": []}], []),
        ([{"sm_mhz": [1900, 1980], "reasons": ["held at its power limit"]}], []),
        (
            [{"sm_mhz": [1200, 1980], "reasons": []}, {"sm_mhz": [1980, 1980], "reasons": []}],
            [
                "the SM clock moved by more than 5% in 1 of 2 cases (1200 to 1980 MHz): ratios "
                "are still meaningful, times are not"
            ],
        ),
        (
            [{"sm_mhz": [1980, 1980], "reasons": ["slowed down by heat"]}] * 3,
            ["the GPU was slowed down by heat in 3 of 3 cases"],
        ),
        ([{"unknown": "no NVML"}] * 2, ["the clocks were not watched: no NVML"]),
        ([], []),
    ],
)
def test_clocks_that_make_times_doubtful_are_warned_of(
    clocks: list[dict[str, Any]], warnings: list[str]
) -> None:
    states = [ClockState.model_validate(one) for one in clocks]
    assert bench_device.clock_warnings(states) == warnings


def test_on_a_cpu_nothing_is_known_of_the_clocks() -> None:
    row = measure(doubled(), [Contender("right", right)], exact, CPU, seconds=0.01)
    assert row.clocks == ClockState(unknown="not a GPU")
    baseline = row.timed("right")
    assert baseline is not None
    assert baseline.verdict is None


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", 0)


@pytest.mark.gpu
def test_slower_same_and_faster_are_told_apart(gpu: torch.device) -> None:
    def work(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            out = x
            for _ in range(size):
                out = 2 * x
            return out

        return run

    contenders = [
        Contender("base", work(4)),
        Contender("same", work(4)),
        Contender("slower", work(5)),
        Contender("faster", work(3)),
    ]
    row = measure(doubled(2048, 4096), contenders, exact, gpu, seconds=0.1)
    timed = {name: row.timed(name) for name in row.contenders}
    verdicts = {name: result and result.verdict for name, result in timed.items()}
    assert verdicts == {"base": None, "same": "same", "slower": "slower", "faster": "faster"}
    assert row.cold
    assert timed["slower"] is not None
    assert timed["slower"].ratio == pytest.approx(4 / 5, abs=0.06)


@pytest.mark.gpu
def test_every_call_finds_a_cold_l2(gpu: torch.device) -> None:
    """A copy of what fits in L2 many times over cannot be faster than HBM allows."""
    case = doubled(1024, 2048)  # 8 MB read, 8 MB written
    limits = bench_device.ceilings(gpu, [])
    timed = measure(case, [Contender("right", right)], exact, gpu, 0.05).timed("right")
    assert timed is not None
    assert case.bytes / (timed.us * 1e-6) < 1.1 * limits.bytes_per_second


@pytest.mark.gpu
def test_ceilings_are_what_such_a_gpu_can_do(gpu: torch.device) -> None:
    limits = bench_device.ceilings(gpu, ["bfloat16", "float8_e4m3fn", "int8", "no_such_dtype"])
    assert 0.2e12 < limits.bytes_per_second < 20e12
    assert set(limits.missing) >= {"no_such_dtype"}
    rates = limits.flops_per_second
    assert rates["bfloat16"] > 20e12
    for eight_bits in rates.keys() - {"bfloat16"}:
        assert rates[eight_bits] > rates["bfloat16"]


@pytest.mark.gpu
def test_clocks_are_watched_where_nvml_is_installed(gpu: torch.device) -> None:
    pytest.importorskip("pynvml")
    row = measure(doubled(2048, 4096), [Contender("right", right)], exact, gpu, 0.05)
    assert row.clocks.sm_mhz is not None
    low, high = row.clocks.sm_mhz
    assert 0 < low <= high < 5000


@pytest.mark.gpu
def test_a_broken_device_is_said_with_the_culprit(gpu: torch.device) -> None:
    """In a process of its own, since nothing can run in it afterwards."""
    import subprocess
    import sys

    script = """
import torch
from custom_kernels.bench import timing
from tests.kernels.bench.test_timing import Contender, doubled, exact, measure, right
def smash(x):
    torch.cuda._sleep(1)
    index = torch.full((1,), 2**40, device=x.device)
    return 2 * x + x.flatten()[index] * 0
try:
    measure(doubled(), [Contender("right", right), Contender("smash", smash)], exact,
            torch.device("cuda", 0), 0.01)
except timing.DeviceLostError as error:
    print("LOST", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert "LOST smash left the GPU in an error" in done.stdout, done.stderr[-2000:]
