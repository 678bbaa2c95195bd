# SPDX-License-Identifier: Apache-2.0
"""rms_norm_quant and silu_mul_quant: every backend against the unfused chain, bit for bit, and that
chain against vLLM's; argument checks, and how they behave under torch and CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from custom_kernels import custom_quant_expand, launches, registry
from custom_kernels.check.case import Case
from custom_kernels.check.outputs import poison, unwritten
from custom_kernels.rms_norm_quant import cases as norm_cases
from custom_kernels.rms_norm_quant import custom_rms_norm_quant
from custom_kernels.rms_norm_quant import reference as norm
from custom_kernels.silu_mul_quant import cases as silu_cases
from custom_kernels.silu_mul_quant import custom_silu_mul_quant
from custom_kernels.silu_mul_quant import reference as silu
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

# There are no tolerances: all backends give the same bits.

INT8, FP8 = torch.int8, torch.float8_e4m3fn
PATTERNS = [None, "2:4", "4:6", "6:8", "8:10", "30:32"]
NORM, SILU = (registry.operation(name) for name in ("rms_norm_quant", "silu_mul_quant"))
EPSILON = 1e-6

each_backend = pytest.mark.parametrize(
    "backend",
    ["reference", pytest.param("cuda", marks=pytest.mark.gpu)],
)


def device_of(backend: str) -> torch.device:
    return torch.device("cpu") if backend == "reference" else torch.device("cuda", 0)


def make(m: int, k: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Normal values, an outlier channel among them."""
    x = torch.randn(m, k, device=device)
    if m and k > 2:
        x[:, k // 3] *= 40
    return x.bfloat16()


def weight_of(k: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return (1 + torch.randn(k, device=device) / 5).bfloat16()


def assert_same(got: Any, right: Any) -> None:
    """Every bit; one NaN of a scale is as good as another."""
    for one, other in zip(got, right, strict=True):
        assert (one.shape, one.dtype, one.is_contiguous()) == (other.shape, other.dtype, True)
        if one.dtype in (torch.float32, torch.bfloat16):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def assert_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    pattern: str | None,
    dtype: torch.dtype,
    backend: str,
    epsilon: float = EPSILON,
) -> Any:
    """Equal to the norm, rounded to bfloat16, and then quant_expand."""
    weight = weight_of(x.shape[-1], x.device)
    y, total = norm.normalize(x, residual, weight, epsilon)
    assert y.dtype == torch.bfloat16
    right = *custom_quant_expand(y, pattern, dtype, backend="reference"), total
    got = custom_rms_norm_quant(x, residual, weight, epsilon, pattern, dtype, backend=backend)
    assert_same(got, right)
    return got


def assert_silu(x: torch.Tensor, pattern: str | None, dtype: torch.dtype, backend: str) -> Any:
    """Equal to the activation, rounded to bfloat16, and then quant_expand."""
    y = silu.activate(x)
    assert y.dtype == torch.bfloat16
    right = custom_quant_expand(y, pattern, dtype, backend="reference")
    got = custom_silu_mul_quant(x, pattern, dtype, backend=backend)
    assert_same(got, right)
    return got


@each_backend
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    m=st.integers(0, 5),
    k=st.integers(1, 300),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from([INT8, FP8]),
    residual=st.booleans(),
    more=st.integers(0, 9),
    offset=st.integers(0, 8),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
)
@example(m=2, k=4096, pattern="2:4", dtype=FP8, residual=True, more=0, offset=0, scale=1.0)
@example(m=3, k=9001, pattern="6:8", dtype=INT8, residual=True, more=3, offset=1, scale=1.0)
@example(m=0, k=64, pattern="6:8", dtype=FP8, residual=True, more=0, offset=0, scale=1.0)
def test_any_shape_and_stride_equals_the_unfused_chain(
    backend: str,
    m: int,
    k: int,
    pattern: str | None,
    dtype: torch.dtype,
    residual: bool,
    more: int,
    offset: int,
    scale: float,
) -> None:
    torch.manual_seed(m * 7919 + k)
    device = device_of(backend)

    def rows(width: int) -> torch.Tensor:
        memory = make(1, offset + m * (width + more) + 1, device)[0] * scale
        return memory[offset : offset + m * (width + more)].view(m, width + more)[:, :width]

    assert_norm(rows(k), rows(k) if residual else None, pattern, dtype, backend)
    assert_silu(rows(2 * k), pattern, dtype, backend)


@each_backend
@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("pattern", [None, "2:4", "6:8"])
def test_special_rows(backend: str, pattern: str | None, dtype: torch.dtype) -> None:
    device, k = device_of(backend), 72
    x = make(9, 2 * k, device)
    x[0] = 0
    x[1] = -0.0
    x[2, 3] = math.inf
    x[3, 5] = math.nan
    x[4] = math.nan
    x[5, :k] = -math.inf
    x[6] *= 1e-30  # squares are zero
    x[7] = 1e20  # squares are infinite
    x[8] *= 1e-39  # subnormal
    for residual in (None, torch.zeros_like(x[:, :k])):
        q, scale, _ = assert_norm(x[:, :k], residual, pattern, dtype, backend)
        assert scale[:2].eq(0).all()
        assert scale[2:6].isnan().all()
        assert scale[6].isfinite()
        assert scale[7] == 0
        assert q[:6].view(torch.uint8).eq(0).all()
    assert_norm(x[:, :k], x[:, k:], pattern, dtype, backend, epsilon=0.0)
    q, scale = assert_silu(x, pattern, dtype, backend)
    assert scale[:2].eq(0).all()
    assert scale[2:6].isnan().all()
    assert q[:6].view(torch.uint8).eq(0).all()


@each_backend
def test_every_gate_is_rounded_as_torch_rounds_it(backend: str) -> None:
    """All 65,536 values of bfloat16, each with a row of its own scale."""
    gates = torch.arange(65_536).to(torch.int16).view(torch.bfloat16).to(device_of(backend))
    x = torch.stack([gates, torch.ones_like(gates)], 1)
    _, scale = assert_silu(x, None, INT8, backend)
    finite = gates.isfinite()
    amax = silu.activate(x)[:, 0].float().abs()  # the scale tells the activation
    assert torch.equal(scale[finite], (amax / torch.full_like(amax, 127))[finite])


def test_the_reference_is_vllm_s_norm_but_for_the_order_of_the_sum() -> None:
    x, residual, weight = make(64, 3584), make(64, 3584), weight_of(3584)
    for other in (None, residual):
        y, total = norm.normalize(x, other, weight, EPSILON)
        right, right_total = norm_cases._norm(
            x, torch.zeros_like(x) if other is None else other, weight, EPSILON
        )
        if other is not None:
            assert torch.equal(total, right_total)
        step = (y.view(torch.int16).int() - right.view(torch.int16).int()).abs()
        assert int(step.max()) <= 2  # rounded twice
        assert float((step > 0).float().mean()) < 1e-3


def test_the_sum_of_squares_is_in_the_order_that_is_documented() -> None:
    k = 2 * 4096 + 16
    values = torch.randn(1, k)
    squares = (values * values)[0].tolist() + [0.0] * (3 * 4096 - k)
    float32 = torch.tensor

    def halves(items: list[float]) -> float:
        while len(items) > 1:
            half = len(items) // 2
            items = (float32(items[:half]) + float32(items[half:])).tolist()
        return items[0]

    lanes = [0.0] * 512
    for i in range(3 * 512):
        vector = halves(squares[8 * i : 8 * i + 8])
        lanes[i % 512] = float(float32(lanes[i % 512]) + float32(vector))
    assert float(norm.sum_of_squares(values)) == halves(lanes)


def test_leading_dimensions_are_kept() -> None:
    x, residual, weight = make(6, 80), make(6, 80), weight_of(80)
    flat = custom_rms_norm_quant(x, residual, weight, EPSILON, "6:8")
    flat_silu = custom_silu_mul_quant(x, "6:8")
    for shape in [(2, 3), (6,), (1, 6), (3, 1, 2)]:
        got = custom_rms_norm_quant(
            x.view(*shape, 80), residual.view(*shape, 80), weight, EPSILON, "6:8"
        )
        assert_same(got, [part.view(*shape, *part.shape[1:]) for part in flat])
        got_silu = custom_silu_mul_quant(x.view(*shape, 80), "6:8")
        assert_same(got_silu, [part.view(*shape, *part.shape[1:]) for part in flat_silu])
    q, scale, total = custom_rms_norm_quant(x[0], None, weight, EPSILON)
    assert (q.shape, scale.shape, total.shape) == ((80,), (), (0,))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    k=st.integers(1, 40),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from([INT8, FP8]),
    residual=st.booleans(),
)
def test_the_fake_output_is_shaped_and_laid_out_like_the_real_one(
    shape: list[int], k: int, pattern: str | None, dtype: torch.dtype, residual: bool
) -> None:
    x, weight = torch.randn(*shape, k).bfloat16(), weight_of(k)
    other = x if residual else None
    real = custom_rms_norm_quant(x, other, weight, EPSILON, pattern, dtype)
    meta = x.to("meta")
    fake = custom_rms_norm_quant(
        meta, meta if residual else None, weight.to("meta"), EPSILON, pattern, dtype
    )
    wide = torch.cat([x, x], -1)
    real += custom_silu_mul_quant(wide, pattern, dtype)
    fake += custom_silu_mul_quant(wide.to("meta"), pattern, dtype)
    for one, two in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)


@each_backend
@pytest.mark.parametrize("residual", [True, False])
def test_opcheck(backend: str, residual: bool) -> None:
    x = make(4, 40, device_of(backend))
    other = x.clone() if residual else None
    norm_arguments = (x, other, weight_of(40, x.device), EPSILON, "6:8", INT8, backend)
    torch.library.opcheck(torch.ops.custom_kernels.rms_norm_quant, norm_arguments)
    torch.library.opcheck(torch.ops.custom_kernels.silu_mul_quant, (x, "6:8", INT8, backend))


# --- errors ---------------------------------------------------------------------------------------


def one_line(call: Callable[..., Any], error: type[Exception], message: str, *given: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        call(*given)
    assert "\n" not in str(caught.value)


def test_a_wrong_argument_is_one_clear_error() -> None:
    x, weight = torch.ones(2, 8).bfloat16(), torch.ones(8).bfloat16()

    def bad(error: type[Exception], message: str, *given: Any) -> None:
        one_line(custom_rms_norm_quant, error, f"rms_norm_quant: {message}", *given)

    bad(ValueError, r"x must be \[\.\.\., K\] with K at least 1", x[:, :0], None, weight[:0], 1e-6)
    bad(ValueError, r"weight must be \[8\] like a row of x, got \[4\]", x, None, weight[:4], 1e-6)
    bad(ValueError, r"residual must be \[2, 8\] like x, got \[1, 8\]", x, x[:1], weight, 1e-6)
    bad(TypeError, "weight must be bfloat16, got torch.float32", x, None, weight.float(), 1e-6)
    bad(TypeError, "x must be bfloat16, got torch.float16", x.half(), None, weight, 1e-6)
    bad(TypeError, "dtype must be int8 or float8", x, None, weight, 1e-6, None, torch.uint8)
    bad(ValueError, "'68' is not a pattern", x, None, weight, 1e-6, "68")

    def worse(error: type[Exception], message: str, *given: Any) -> None:
        one_line(custom_silu_mul_quant, error, f"silu_mul_quant: {message}", *given)

    worse(ValueError, r"x must be \[\.\.\., 2K\] with K at least 1, got \[2, 7\]", x[:, :7])
    worse(ValueError, r"x must be \[\.\.\., 2K\] with K at least 1, got \[2, 0\]", x[:, :0])
    worse(TypeError, "x must be bfloat16, got torch.float32", x.float())
    worse(TypeError, "dtype must be int8 or float8_e4m3fn", x, None, torch.uint8)
    worse(ValueError, "4:8 is not a pattern", x, "4:8")


def test_a_call_is_counted_and_an_error_is_not() -> None:
    launches.reset()
    x, weight = torch.ones(2, 8).bfloat16(), torch.ones(8).bfloat16()
    custom_rms_norm_quant(x, None, weight, EPSILON)
    custom_silu_mul_quant(x)
    with pytest.raises(ValueError, match="1:3"):
        custom_silu_mul_quant(x, "1:3")
    assert launches.counts() == {"rms_norm_quant.reference": 1, "silu_mul_quant.reference": 1}


# --- the cases that are measured ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", norm_cases.DTYPES)
def test_a_case_counts_the_bytes_that_move_and_sees_a_wrong_bit(dtype: str) -> None:
    runs: list[tuple[Case, Callable[..., Any], int]] = [
        (norm_cases.case({}, 4, 96, "6:8", dtype), norm.run, 4 * (6 * 96 + 192 + 4) + 2 * 96),
        (silu_cases.case({}, 4, 96, "6:8", dtype), silu.run, 4 * (4 * 96 + 192 + 4)),
    ]
    for case, run, moved in runs:
        assert case.bytes == moved
        inputs = case.empty_inputs(torch.device("cpu"))
        case.fill(inputs)
        outputs = run(*inputs)
        assert case.error is not None
        assert case.error(inputs, outputs) == 0
        for part in outputs:
            part.view(torch.uint8)[0] ^= 1
            assert case.error(inputs, outputs) > 0
            part.view(torch.uint8)[0] ^= 1
        plain = run(*inputs[:-2], None, inputs[-1])[:2]
        assert case.error(inputs, norm_cases.Rounded(*plain)) == 0
        assert case.error(inputs, norm_cases.Rounded(plain[0], plain[1] * 1.1)) > 0


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [None, "2:4", "4:6", "6:8", "8:10", "12:14", "30:32"])
@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_every_schedule_of_the_cuda_kernels(
    gpu: torch.device, pattern: str | None, dtype: torch.dtype
) -> None:
    norm_by = NORM.backend("cuda").library(gpu)["rms_norm_quant_by"]
    silu_by = SILU.backend("cuda").library(gpu)["silu_mul_quant_by"]
    hopper = torch.cuda.get_device_capability(gpu) >= (9, 0)
    for m, k in [(1, 8), (5, 1024), (37, 3592), (300, 896), (7, 4864)]:
        x, residual, weight = make(m, k, gpu), make(m, k, gpu), weight_of(k, gpu)
        wide = make(m, 2 * k, gpu)
        rights = {
            one is None: norm.run(x, one, weight, EPSILON, pattern, dtype)
            for one in (None, residual)
        }
        right_silu = silu.run(wide, pattern, dtype)
        for warps, teams in [(1, 1), (1, 3), (3, 4), (4, 3), (16, 1)]:
            for one in (None, residual):
                for bulk in [True, False] if hopper else [False]:
                    out = NORM.module.empty_output(x, one, weight, EPSILON, pattern, dtype)
                    poison(out)
                    norm_by(x, one, weight, EPSILON, pattern, *out, bulk, warps, teams)
                    assert_same(out, rights[one is None])
            out = SILU.module.empty_output(wide, pattern, dtype)
            poison(out)
            silu_by(wide, pattern, *out, warps, teams)
            assert_same(out, right_silu)
        out = SILU.module.empty_output(wide, pattern, dtype)
        silu_by(wide, pattern, *out, 32, 1)
        assert_same(out, right_silu)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("m", [1, 64, 133, 5000])
def test_models_shapes_equal_the_unfused_chain(
    gpu: torch.device, m: int, dtype: torch.dtype
) -> None:
    for k, wide in ((896, 4864), (3584, 18944)):
        for pattern in ("2:4", "4:6", "6:8"):
            assert_norm(make(m, k, gpu), make(m, k, gpu), pattern, dtype, "cuda")
            assert_norm(make(m, k, gpu), None, pattern, dtype, "cuda")
            assert_silu(make(m, 2 * wide, gpu), pattern, dtype, "cuda")


@pytest.mark.gpu
def test_capture_and_replay(gpu: torch.device) -> None:
    x, residual, weight = make(24, 1160, gpu), make(24, 1160, gpu), weight_of(1160, gpu)
    custom_rms_norm_quant(x, residual, weight, EPSILON, "6:8", FP8)
    custom_silu_mul_quant(x, "6:8", FP8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = custom_rms_norm_quant(x, residual, weight, EPSILON, "6:8", FP8)
        out_silu = custom_silu_mul_quant(x, "6:8", FP8)
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        residual.normal_()
        poison((out, out_silu))
        graph.replay()
        torch.cuda.synchronize()
        assert unwritten((out, out_silu)) == 0
        assert_same(out, norm.run(x, residual, weight, EPSILON, "6:8", FP8))
        assert_same(out_silu, silu.run(x, "6:8", FP8))


@pytest.mark.gpu
def test_more_elements_than_32_bits_can_count(gpu: torch.device) -> None:
    m, k = 300_000, 8192
    x = torch.randn(m // 6, k, device=gpu, dtype=torch.bfloat16).repeat(6, 1)
    weight = weight_of(k, gpu)
    assert x.numel() > 2**31
    found = custom_rms_norm_quant(x, x, weight, EPSILON, "2:4", FP8)
    rows = slice(m - 3, m)
    assert_same(
        [part[rows] for part in found], norm.run(x[rows], x[rows], weight, EPSILON, "2:4", FP8)
    )
    found = custom_silu_mul_quant(x, "2:4", FP8)
    assert_same([part[rows] for part in found], silu.run(x[rows], "2:4", FP8))


@pytest.mark.gpu
def test_kernels_that_overlap_in_a_stream_wait_for_each_other(gpu: torch.device) -> None:
    """Each kernel's input is written by the one right before it, as in a layer."""
    m, k = 512, 3584
    weight = weight_of(k, gpu)
    sources = [make(m, 2 * k, gpu) for _ in range(4)]
    x = torch.empty_like(sources[0])
    rights = []
    for source in sources:
        left, right = source[:, :k], source[:, k:]
        first = norm.run(left, right, weight, EPSILON, "6:8", FP8)
        rights.append((*first, *norm.run(first[2], right, weight, EPSILON, "2:4", FP8),
                       *silu.run(source, "6:8", FP8)))  # fmt: skip
    found = []
    for i in range(40):
        torch.mul(sources[i % 4], 1, out=x)
        left, right = x[:, :k], x[:, k:]
        first = custom_rms_norm_quant(left, right, weight, EPSILON, "6:8", FP8)
        second = custom_rms_norm_quant(first[2], right, weight, EPSILON, "2:4", FP8)
        found.append((*first, *second, *custom_silu_mul_quant(x, "6:8", FP8)))
    for i in range(40):
        assert_same(found[i], rights[i % 4])
