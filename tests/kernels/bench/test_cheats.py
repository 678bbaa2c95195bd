# SPDX-License-Identifier: Apache-2.0
"""Kernels that game a benchmark get no time, only the reason. Each is a way that was seen in public
competitions of kernels; docs/measuring.md lists them, and those that cannot be caught."""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from custom_kernels import registry
from custom_kernels.bench.record import Failed
from custom_kernels.bench.timing import measure
from custom_kernels.check.case import Case, Contender
from custom_kernels.check.check import check_case

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ON = [CPU, pytest.param(GPU, marks=pytest.mark.gpu)]
ROWS, COLUMNS = 4096, 64


def doubled() -> Case:
    return Case(
        labels={"M": ROWS},
        empty_inputs=lambda device: (torch.empty(ROWS, COLUMNS, device=device),),
        fill=lambda inputs: inputs[0].normal_(),
        flops=float(ROWS * COLUMNS),
        bytes=8.0 * ROWS * COLUMNS,
        tolerance=1e-6,
    )


def exact(x: torch.Tensor) -> torch.Tensor:
    return 2 * x.double()


def timed(run: Callable[..., Any], device: torch.device) -> str:
    """Why it got no time."""
    contenders = [Contender("honest", lambda x: 2 * x), Contender("cheat", run)]
    found = measure(doubled(), contenders, exact, device, seconds=0.01).contenders
    assert not isinstance(found["honest"], Failed)
    assert isinstance(found["cheat"], Failed), found["cheat"]
    return found["cheat"].failure


def only_sampled_rows(x: torch.Tensor) -> torch.Tensor:
    rows = torch.linspace(0, ROWS - 1, 48, device=x.device).long()
    y = torch.zeros_like(x)
    y[rows] = 2 * x[rows]
    return y


def overwritten_inputs(x: torch.Tensor) -> torch.Tensor:
    x.zero_()
    return torch.zeros_like(x)


class OneShapeOneResult:
    def __init__(self) -> None:
        self.known: dict[torch.Size, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.known.setdefault(x.shape, 2 * x).clone()


class OneBuffer:
    """All outputs in one place, which stays in L2."""

    def __init__(self) -> None:
        self.y: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.y = torch.empty_like(x) if self.y is None else self.y
        return self.y.copy_(2 * x)


@pytest.mark.parametrize("device", ON, ids=str)
@pytest.mark.parametrize(
    ("cheat", "failure"),
    [
        (lambda: only_sampled_rows, "is allowed"),
        (lambda: overwritten_inputs, "it wrote over its input 0"),
        (OneShapeOneResult, "is allowed"),
        (OneBuffer, "is allowed"),
    ],
    ids=["only sampled rows", "overwritten inputs", "one result for a shape", "one buffer"],
)
def test_a_result_that_is_not_computed_each_time_and_as_a_whole_gets_no_time(
    device: torch.device, cheat: Callable[[], Callable[..., Any]], failure: str
) -> None:
    assert failure in timed(cheat(), device)


@pytest.fixture
def own_clocks() -> Iterator[None]:
    yield
    assert time.perf_counter.__module__ == "time"
    assert torch.cuda.Event.__module__ == "torch.cuda.streams"


@pytest.mark.usefixtures("own_clocks")
@pytest.mark.parametrize("device", ON, ids=str)
@pytest.mark.parametrize(
    "name", ["time.perf_counter", "torch.cuda.Event", "torch.cuda.synchronize"]
)
def test_a_replaced_clock_is_found_and_put_back(
    device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, _, function = name.rpartition(".")
    place = {"time": time, "torch.cuda": torch.cuda}[owner]
    original = getattr(place, function)

    def cheat(x: torch.Tensor) -> torch.Tensor:
        setattr(place, function, functools.partial(original))
        return 2 * x

    monkeypatch.setattr(place, function, original)  # put back, whatever happens
    assert f"it replaced {name}, by which it is timed" in timed(cheat, device)
    assert getattr(place, function) is original


def test_a_lower_precision_than_the_dtype_is_an_error() -> None:
    """bfloat16 inputs rounded to 8 bits, as a GEMM on faster tensor cores would have them."""
    gemm = registry.operation("gemm")
    case = next(
        one
        for one in gemm.cases.checks("bfloat16")
        if all(t is None or t.numel() for t in one.empty_inputs(CPU))
    )

    def narrow(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x, weight = (one.to(torch.float8_e4m3fn).to(one.dtype) for one in (x, weight))
        return torch.nn.functional.linear(x, weight, bias)

    found = check_case(Contender("cheat", narrow), case, gemm.reference.exact, CPU)
    assert found.failure is not None
    assert "is allowed" in found.failure


# --- what only a GPU can do -----------------------------------------------------------------------


def on_another_stream(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.mul(x, 2, out=y)
    return y


def after_the_call(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)

    def later() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.mul(x, 2, out=y)

    threading.Timer(0.002, later).start()
    return y


def only_outside_of_graphs(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x) if torch.cuda.is_current_stream_capturing() else 2 * x


@pytest.mark.gpu
@pytest.mark.parametrize("run", [on_another_stream, after_the_call, only_outside_of_graphs])
def test_work_that_is_not_part_of_the_call_gets_no_time(run: Callable[..., Any]) -> None:
    assert timed(run, GPU)
    found = check_case(Contender("cheat", run), doubled(), exact, GPU)
    assert found.failure is not None
    # Neither leaves anything behind that would harm who comes next.
    torch.cuda.synchronize()
    assert torch.equal(torch.ones(8, device=GPU) * 2, torch.full((8,), 2.0, device=GPU))


@pytest.mark.gpu
def test_a_part_of_l2_that_is_set_aside_is_found() -> None:
    driver = ctypes.CDLL("libcuda.so.1")

    def cheat(x: torch.Tensor) -> torch.Tensor:
        driver.cuCtxSetLimit(6, ctypes.c_size_t(2**20))  # CU_LIMIT_PERSISTING_L2_CACHE_SIZE
        return 2 * x

    assert "of L2 for itself" in timed(cheat, GPU)
