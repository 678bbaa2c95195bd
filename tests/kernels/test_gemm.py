# SPDX-License-Identifier: Apache-2.0
"""custom_gemm: every backend against float64, its argument checks, and how it behaves under torch
and CUDA graphs."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from custom_kernels import custom_gemm, launches, registry
from custom_kernels.buckets import buckets
from custom_kernels.gemm import OPERATION, cublaslt, empty_output
from custom_kernels.gemm.reference import exact
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

# Elementwise |out - exact| <= atol + rtol * |exact|, outputs of variance about 1. Half a unit in
# the last place of bfloat16 is 2^-9 relative, of float16 2^-12; atol covers cancellation in float32
# sums.
TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    torch.bfloat16: {"rtol": 2**-8, "atol": 2e-3},
    torch.float16: {"rtol": 2**-11, "atol": 5e-4},
    torch.float32: {"rtol": 1e-5, "atol": 5e-5},
}


@pytest.fixture(params=OPERATION.backend_names())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that the folder holds."""
    return str(request.param)


def make(
    m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    x = torch.randn(m, k, device=device).to(dtype)
    weight = (torch.randn(n, k, device=device) / math.sqrt(max(k, 1))).to(dtype)
    return x, weight, torch.randn(n, device=device).to(dtype) if bias else None


def assert_right(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    wanted = exact(x, weight, bias)
    assert out.dtype == x.dtype
    torch.testing.assert_close(out.double(), wanted, **TOLERANCES[x.dtype])


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [dtype for dtype in TOLERANCES if OPERATION.backend(backend).supports_dtype(dtype)]


SIZES = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 200, 257]))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    m=st.one_of(st.sampled_from([0, 1, 2]), SIZES),
    n=SIZES,
    k=SIZES,
    bias=st.booleans(),
    data=st.data(),
)
@example(m=0, n=8, k=8, bias=True, data=None)
@example(m=1, n=1, k=1, bias=True, data=None)
@example(m=33, n=1001, k=1003, bias=False, data=None)
def test_matches_exact_at_any_shape(
    backend: str,
    device: torch.device,
    m: int,
    n: int,
    k: int,
    bias: bool,
    data: st.DataObject | None,
) -> None:
    dtypes = dtypes_of(backend)
    dtype = dtypes[0] if data is None else data.draw(st.sampled_from(dtypes), "dtype")
    torch.manual_seed(m * 7919 + n * 104729 + k)
    x, weight, b = make(m, n, k, dtype, device, bias)
    out = custom_gemm(x, weight, b, backend=backend)
    assert out.shape == (m, n)
    assert_right(out, x, weight, b)


@pytest.mark.parametrize("layout", ["row stride", "transposed", "expanded", "offset"])
def test_input_that_is_not_contiguous(backend: str, device: torch.device, layout: str) -> None:
    m, n, k = 6, 24, 40
    for dtype in dtypes_of(backend):
        x, weight, bias = make(m, n, k, dtype, device)
        if layout == "row stride":
            x = torch.randn(m, 3 * k, device=device).to(dtype)[:, k : 2 * k]
        elif layout == "transposed":
            x = x.t().contiguous().t()
        elif layout == "expanded":
            x = x[:1].expand(m, k)
        else:
            x = torch.randn(m * k + 3, device=device).to(dtype)[3:].view(m, k)
        assert_right(custom_gemm(x, weight, bias, backend=backend), x, weight, bias)


def test_leading_dimensions_are_kept(backend: str, device: torch.device) -> None:
    x, weight, bias = make(30, 24, 40, dtypes_of(backend)[0], device)
    flat = custom_gemm(x, weight, bias, backend=backend)
    for shape in [(2, 15), (2, 3, 5), (30,), (1, 30)]:
        out = custom_gemm(x.view(*shape, 40), weight, bias, backend=backend)
        assert torch.equal(out, flat.view(*shape, 24))
    assert custom_gemm(x[0], weight, bias, backend=backend).shape == (24,)
    assert custom_gemm(x[:0].view(0, 3, 40), weight, bias, backend=backend).shape == (0, 3, 24)


def test_without_k_the_result_is_the_bias(backend: str, device: torch.device) -> None:
    x, weight, bias = make(3, 4, 0, dtypes_of(backend)[0], device)
    assert bias is not None
    assert torch.equal(custom_gemm(x, weight, bias, backend=backend), bias.expand(3, 4))
    assert torch.equal(custom_gemm(x, weight, backend=backend), torch.zeros_like(bias.expand(3, 4)))


def test_linear_in_x_for_powers_of_two(backend: str, device: torch.device) -> None:
    """Scaling by 2 is exact in floating point, so it commutes with every rounding."""
    x, weight, _ = make(17, 48, 64, dtypes_of(backend)[0], device, bias=False)
    out = custom_gemm(x, weight, backend=backend)
    assert torch.equal(custom_gemm(2 * x, weight, backend=backend), 2 * out)


def test_the_same_call_gives_the_same_bits(backend: str, device: torch.device) -> None:
    for m, n, k in [(1, 40, 1000), (16, 72, 2048), (33, 100, 520)]:
        x, weight, bias = make(m, n, k, dtypes_of(backend)[0], device)
        first = custom_gemm(x, weight, bias, backend=backend)
        for _ in range(3):
            assert torch.equal(custom_gemm(x, weight, bias, backend=backend), first)


@pytest.mark.parametrize("k", [4096, 18944, 20001])
def test_long_rows(backend: str, device: torch.device, k: int) -> None:
    for m in (1, 9):
        x, weight, bias = make(m, 24, k, dtypes_of(backend)[0], device)
        assert_right(custom_gemm(x, weight, bias, backend=backend), x, weight, bias)


# Infinity times zero, in Triton's interpreter.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("m", [3, 12, 40])
def test_inf_and_nan_stay_in_their_row_and_column(
    backend: str, device: torch.device, m: int
) -> None:
    x, weight, bias = make(m, 37, 104, dtypes_of(backend)[0], device)
    x[1, 5], x[2, 103] = math.inf, math.nan
    weight[20, 7] = math.nan
    weight[:, 5] = weight[:, 5].abs() + 0.125
    out = custom_gemm(x, weight, bias, backend=backend)
    wanted = exact(x, weight, bias)
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.isinf(), wanted.isinf())
    finite = wanted.isfinite()
    torch.testing.assert_close(out.double()[finite], wanted[finite], **TOLERANCES[out.dtype])


def test_without_a_measurement_the_order_of_preference_decides() -> None:
    launches.reset()
    custom_gemm(torch.ones(2, 8), torch.ones(4, 8))
    assert launches.counts() == {"gemm.reference": 1}


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "message"),
    [
        (
            (2, 8),
            (4, 7),
            None,
            ValueError,
            r"x must be \[\.\.\., K\] and weight \[N, K\], got \[2, 8\] and \[4, 7\]",
        ),
        ((2, 8), (4, 2, 4), None, ValueError, r"x must be \[\.\.\., K\] and weight \[N, K\]"),
        ((), (4, 8), None, ValueError, r"x must be"),
        ((2, 8), (4, 8), (5,), ValueError, r"bias must be \[4\], one per row of weight, got \[5\]"),
        ((2, 8), (4, 8), (4, 1), ValueError, r"bias must be \[4\]"),
    ],
)
def test_a_wrong_shape_is_one_clear_error(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    bias: tuple[int, ...] | None,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as caught:
        custom_gemm(torch.ones(x), torch.ones(weight), None if bias is None else torch.ones(bias))
    assert "\n" not in str(caught.value)


def test_a_wrong_dtype_device_or_layout_is_one_clear_error() -> None:
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    with pytest.raises(
        TypeError, match=r"share one floating dtype, got torch.float32, torch.float16"
    ):
        custom_gemm(x, weight.half())
    with pytest.raises(TypeError, match=r"share one floating dtype"):
        custom_gemm(x.int(), weight.int())
    with pytest.raises(TypeError, match=r"share one floating dtype, .*float64"):
        custom_gemm(x, weight, torch.ones(4).double())
    with pytest.raises(ValueError, match=r"unit inner stride .*, got strides \[1, 4\]"):
        custom_gemm(x, weight.t().contiguous().t())
    with pytest.raises(ValueError, match=r"on one device, got cpu, meta"):
        custom_gemm(x, weight.to("meta"))


def test_a_wrong_backend_is_one_clear_error() -> None:
    with pytest.raises(registry.BackendError, match=r"no such backend; available: reference"):
        custom_gemm(torch.ones(2, 8), torch.ones(4, 8), backend="cublastl")
    with pytest.raises(
        registry.BackendError, match=r"cublaslt.* on cpu: it runs on CUDA devices only"
    ):
        custom_gemm(torch.ones(2, 8), torch.ones(4, 8), backend="cublaslt")


def test_a_call_is_counted_and_an_error_is_not() -> None:
    launches.reset()
    custom_gemm(torch.ones(2, 8), torch.ones(4, 8), backend="reference")
    with pytest.raises(ValueError, match=r"weight"):
        custom_gemm(torch.ones(2, 8), torch.ones(4, 7), backend="reference")
    assert launches.counts() == {"gemm.reference": 1}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (0,)])
def test_opcheck(backend: str, device: torch.device, bias: bool, shape: tuple[int, ...]) -> None:
    x, weight, b = make(math.prod(shape), 24, 40, dtypes_of(backend)[0], device, bias)
    arguments = (x.view(*shape, 40), weight, b, backend)
    torch.library.opcheck(torch.ops.custom_kernels.gemm, arguments)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    n=st.integers(0, 9),
    k=st.integers(0, 9),
    stride=st.integers(1, 2),
)
def test_the_fake_output_is_shaped_and_laid_out_like_the_real_one(
    shape: list[int], n: int, k: int, stride: int
) -> None:
    x, weight = torch.randn(*shape, k * stride)[..., ::stride], torch.randn(n, k)
    real = custom_gemm(x, weight)
    fake = custom_gemm(x.to("meta"), weight.to("meta"))
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert empty_output(x, weight).stride() == real.stride()


def test_compiles_to_one_op_without_a_graph_break(backend: str, device: torch.device) -> None:
    x, weight, bias = make(6, 24, 40, dtypes_of(backend)[0], device)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda x: torch.relu(custom_gemm(x, weight, bias, backend=backend)),
        backend=keep,
        fullgraph=True,
    )
    assert torch.equal(compiled(x), torch.relu(custom_gemm(x, weight, bias, backend=backend)))
    calls = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [name for name in calls if "custom_kernels" in name] == [
        "custom_kernels.gemm.default"
    ] or [name for name in calls if "gemm" in name] == ["custom_kernels.gemm"]


def test_buckets_are_exact_for_small_batches_and_four_per_doubling_after() -> None:
    assert list(buckets(1)) == [1]
    assert list(buckets(64)) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert list(buckets(70_000))[-5:] == [40_960, 49_152, 57_344, 65_536, 81_920]
    for rows in (3, 9, 100, 1000, 8192, 70_000):
        *_, last = buckets(rows)
        assert rows <= last <= max(8, 2 * rows)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 24, 300])
def test_every_backend_is_captured_and_replayed(
    gpu: torch.device, backend: str, device: torch.device, m: int
) -> None:
    if device != gpu:
        pytest.skip(f"{backend} does not run on the GPU")
    x, weight, b = make(m, 1168, 904, dtypes_of(backend)[0], gpu)
    custom_gemm(x, weight, b, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = custom_gemm(x, weight, b, backend=backend)
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_right(out, x, weight, b)


@pytest.mark.gpu
def test_rows_beyond_32_bit_offsets(gpu: torch.device) -> None:
    """The last row of W starts more than 2^31 elements after the first."""
    k = 64
    weight = torch.empty((2**31 // 2**20 + 2) * 2**20, dtype=torch.bfloat16, device=gpu)
    weight = weight.view(-1, 2**20)[:, :k].normal_()
    x = torch.randn(5, k, dtype=torch.bfloat16, device=gpu)
    for backend in OPERATION.backend_names():
        if OPERATION.backend(backend).unavailable_reason(gpu) is None:
            out = custom_gemm(x, weight, backend=backend)
            torch.testing.assert_close(out.double(), exact(x, weight, None), rtol=2**-8, atol=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("planned", [True, False], ids=["planned", "never seen before"])
def test_capture_and_replay(gpu: torch.device, bias: bool, planned: bool) -> None:
    m, n, k = (24, 1160, 904) if planned else (24, 1176 + 8 * bias, 920)
    x, weight, b = make(m, n, k, torch.bfloat16, gpu, bias)
    if planned:
        custom_gemm(x, weight, b, backend="cublaslt")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = custom_gemm(x, weight, b, backend="cublaslt")
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_right(out, x, weight, b)


@pytest.mark.gpu
def test_capture_neither_searches_nor_synchronizes(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_search(*_: object) -> None:
        raise AssertionError("searched during a capture")

    custom_gemm(*make(1, 64, 64, torch.float16, gpu), backend="cublaslt")
    monkeypatch.setattr(cublaslt._Plans, "search", no_search)
    x, weight, bias = make(7, 1304, 1048, torch.float16, gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = custom_gemm(x, weight, bias, backend="cublaslt")
    graph.replay()
    assert_right(out, x, weight, bias)


@pytest.mark.gpu
def test_every_element_of_a_poisoned_output_is_written(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for m, n, k in [(1, 1152, 896), (3, 999, 777), (130, 4099, 515), (512, 4864, 896)]:
        x, weight, bias = make(m, n, k, torch.bfloat16, gpu)
        # The allocator hands freed memory out again: poison it first.
        torch.full((m, n), math.nan, dtype=torch.bfloat16, device=gpu)
        out = custom_gemm(x, weight, bias, backend="cublaslt")
        assert torch.isfinite(out).all()
        assert_right(out, x, weight, bias)


@pytest.mark.gpu
def test_streams_at_once_do_not_share_scratch(gpu: torch.device) -> None:
    problems = [make(16, 896, 4864, torch.bfloat16, gpu) for _ in range(4)]
    wanted = [custom_gemm(*problem, backend="cublaslt") for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    results: list[list[torch.Tensor]] = [[] for _ in problems]

    def work(index: int) -> None:
        with torch.cuda.stream(streams[index]):
            for _ in range(50):
                results[index].append(custom_gemm(*problems[index], backend="cublaslt"))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for outs, right in zip(results, wanted, strict=True):
        assert len(outs) == 50
        assert all(torch.equal(out, right) for out in outs)


@pytest.mark.gpu
def test_more_elements_than_32_bits_can_count(gpu: torch.device) -> None:
    m, n, k = 70_000, 32_768, 64
    x, weight, bias = make(m, n, k, torch.bfloat16, gpu)
    out = custom_gemm(x, weight, bias, backend="cublaslt")
    assert m * n > 2**31
    for rows in (slice(0, 4), slice(65_530, 65_542), slice(m - 4, m)):
        assert_right(out[rows], x[rows], weight, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cublaslt.DTYPES)
@pytest.mark.parametrize("shape", [(3, 999, 777), (130, 4099, 515), (16, 1152, 896)])
def test_the_result_is_rounded_once(
    gpu: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """Also with a bias, where some kernels that split K round the sum before they add it."""
    x, weight, bias = make(*shape, dtype, gpu)
    out = custom_gemm(x, weight, bias, backend="cublaslt")
    once = exact(x, weight, bias).to(dtype)
    assert (out != once).double().mean() < 0.05


@pytest.mark.gpu
def test_plans_are_kept_on_disk_and_shared(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = make(5, 904, 1000, torch.float16, gpu)
    out = custom_gemm(x, weight, bias, backend="cublaslt")
    kept = cublaslt._Plans(gpu)  # as another process would read them

    def no_search(*_: object) -> None:
        raise AssertionError("searched for what is on disk")

    monkeypatch.setattr(cublaslt._Plans, "search", no_search)
    assert kept.get(8, x, weight, bias, out)
    # Another M of the same bucket takes the same plan.
    assert_right(custom_gemm(x[: 4 + 2], weight, bias, backend="cublaslt"), x[:6], weight, bias)


@pytest.mark.gpu
def test_the_first_call_can_plan_all_smaller_batches(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cublaslt, "plan_smaller_batches", True)
    x, weight, _ = make(64, 1048, 1040, torch.bfloat16, gpu, bias=False)
    custom_gemm(x, weight, backend="cublaslt")

    def no_search(*_: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(cublaslt._Plans, "search", no_search)
    for m in (1, 2, 3, 8, 17, 33, 64):
        assert_right(custom_gemm(x[:m], weight, backend="cublaslt"), x[:m], weight, None)


@pytest.mark.gpu
def test_float32_goes_to_the_reference_when_no_backend_is_named(gpu: torch.device) -> None:
    x, weight, bias = make(4, 24, 40, torch.float32, gpu)
    launches.reset()
    assert_right(custom_gemm(x, weight, bias), x, weight, bias)
    assert launches.counts() == {"gemm.reference": 1}
    with pytest.raises(
        registry.BackendError, match=r"cublaslt does not support torch.float32; these do: reference"
    ):
        custom_gemm(x, weight, bias, backend="cublaslt")


@pytest.mark.gpu
def test_weights_that_want_a_gradient_are_accepted(gpu: torch.device) -> None:
    x, weight, _ = make(4, 24, 40, torch.bfloat16, gpu, bias=False)
    with torch.no_grad():
        out = custom_gemm(x, torch.nn.Parameter(weight), backend="cublaslt")
    assert_right(out, x, weight, None)
