# SPDX-License-Identifier: Apache-2.0
"""custom_quant_expand: every backend against the definition, bit for bit, its argument checks, and
how it behaves under torch and CUDA graphs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from custom_kernels import custom_quant_expand, launches, registry
from custom_kernels.check.outputs import poison, unwritten
from custom_kernels.quant_expand import OPERATION, cases, empty_output, expanded, reference
from custom_kernels.quantization import quantize
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

# There are no tolerances: all backends give the same bits. In the interpreter Triton's conversion
# to e4m3 is wrong for subnormals and where rounding carries into the exponent; there the kernel
# converts with integers, as it does on GPUs without the conversion.

# Special rows overflow and multiply zero by infinity; the interpreter computes with NumPy, which
# warns.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")

INT8, FP8 = torch.int8, torch.float8_e4m3fn
PATTERNS = [None, "2:4", "4:6", "6:8", "8:10", "10:12", "30:32"]


@pytest.fixture(params=OPERATION.backend_names())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that the folder holds."""
    return str(request.param)


def make(
    m: int, k: int, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Normal values, an outlier channel among them."""
    x = torch.randn(m, k, device=device)
    if m and k > 2:
        x[:, k // 3] *= 40
    return x.to(dtype)


def assert_same(
    got: tuple[torch.Tensor, torch.Tensor], right: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Every bit of q and of scale; one NaN is as good as another."""
    q, scale = got
    assert (q.shape, q.dtype, q.is_contiguous()) == (right[0].shape, right[0].dtype, True)
    assert torch.equal(q.view(torch.uint8), right[0].view(torch.uint8))
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, right[1], rtol=0, atol=0, equal_nan=True)


def assert_right(x: torch.Tensor, pattern: str | None, dtype: torch.dtype, backend: str) -> None:
    assert_same(
        custom_quant_expand(x, pattern, dtype, backend=backend), reference.run(x, pattern, dtype)
    )


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    m=st.integers(0, 5),
    k=st.one_of(st.integers(1, 130), st.sampled_from([256, 600])),
    pattern=st.sampled_from(PATTERNS),
    x_dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    dtype=st.sampled_from([INT8, FP8]),
    stride=st.sampled_from([0, 0, 1, 8]),
    offset=st.sampled_from([0, 0, 1, 2, 8]),
    scale=st.sampled_from([1.0, 1e-4, 500.0]),
)
@example(1, 1, "6:8", torch.bfloat16, INT8, 0, 0, 1.0)
@example(3, 96, "8:10", torch.float16, FP8, 8, 8, 1.0)
@example(2, 97, None, torch.bfloat16, FP8, 1, 1, 1.0)
def test_matches_the_definition_at_any_shape_and_layout(
    backend: str,
    device: torch.device,
    m: int,
    k: int,
    pattern: str | None,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    stride: int,
    offset: int,
    scale: float,
) -> None:
    torch.manual_seed(m * 7919 + k)
    memory = make(1, offset + m * (k + stride), x_dtype, device)[0] * scale
    x = memory[offset:].view(m, k + stride)[:, :k]
    assert_right(x, pattern, dtype, backend)


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("pattern", [None, "4:6", "6:8"])
def test_special_rows(
    backend: str, device: torch.device, pattern: str | None, dtype: torch.dtype
) -> None:
    k = 70
    for x_dtype in (torch.bfloat16, torch.float16):
        x = make(14, k, x_dtype, device)
        x[0] = 0
        x[1] = -0.0
        x[2, 3] = math.inf
        x[3, -1] = -math.inf
        x[4, 0] = math.nan
        x[5] = math.nan
        x[6] = torch.finfo(x_dtype).max
        x[7, ::2] = -torch.finfo(x_dtype).max
        x[8] *= 1e-7  # float16: subnormal
        x[9] *= 1e-37  # bfloat16: qmax / amax is close to the largest float
        x[10] *= 1e-39  # bfloat16: subnormal, qmax / amax is infinite
        x[11, 1:] = 0
        x[12, :-1] = 0
        x[12, -1] = torch.finfo(x_dtype).smallest_normal
        x[13, :] = torch.linspace(-1, 1, k, device=device)
        assert_right(x, pattern, dtype, backend)
        q, scale = custom_quant_expand(x, pattern, dtype, backend=backend)
        assert scale[:2].eq(0).all()
        assert scale[2:6].isnan().all()
        assert q[:6].view(torch.uint8).eq(0).all()
        assert scale[6:].isfinite().all()


def test_codes_cover_all_values_and_ties_go_to_even(backend: str, device: torch.device) -> None:
    # amax 127 and 448 make the scale 1: then q is x rounded.
    halves = torch.arange(-254, 255, device=device) / 2
    x = torch.cat([halves, torch.tensor([127.0], device=device)]).to(torch.bfloat16)
    q, scale = custom_quant_expand(x, dtype=INT8, backend=backend)
    assert float(scale) == 1
    assert torch.equal(q[: len(x)].float(), x.float().round())

    codes = torch.arange(256, dtype=torch.uint8, device=device)
    values = codes.view(FP8).to(torch.float16)  # exact: float16 holds all of e4m3
    values = values[values.isfinite()]
    between = (values[:126] + values[1:127]) / 2  # subnormals among them
    x = torch.cat([values, between, -between])
    q, scale = custom_quant_expand(x, dtype=FP8, backend=backend)
    assert float(scale) == 1
    assert torch.equal(q[: len(values)].half(), values)
    assert torch.equal(q[: len(x)].view(torch.uint8), x.to(FP8).view(torch.uint8))
    assert q[len(values) : len(x)].view(torch.uint8).bitwise_and(1).eq(0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_leading_dimensions_are_kept(
    backend: str, device: torch.device, pattern: str | None
) -> None:
    x = make(6, 40, device=device)
    flat_q, flat_scale = custom_quant_expand(x, pattern, backend=backend)
    wide = expanded(40, pattern)
    assert flat_q.shape == (6, wide)
    for shape in [(2, 3), (6,), (1, 6), (3, 1, 2)]:
        q, scale = custom_quant_expand(x.view(*shape, 40), pattern, backend=backend)
        assert torch.equal(q, flat_q.view(*shape, wide))
        assert torch.equal(scale, flat_scale.view(shape))
    q, scale = custom_quant_expand(x[0], pattern, backend=backend)
    assert (q.shape, scale.shape) == ((wide,), ())
    q, scale = custom_quant_expand(x[:0].view(0, 3, 40), pattern, backend=backend)
    assert (q.shape, scale.shape) == ((0, 3, wide), (0, 3))


def test_input_whose_rows_are_not_adjacent_or_overlap(backend: str, device: torch.device) -> None:
    x = make(6, 40, device=device)
    for view in (x.t().contiguous().t(), x[:, ::2], x[:1].expand(6, 40), x.flip(0)):
        assert_right(view, "6:8", INT8, backend)
    assert_right(x.flatten().as_strided((4, 24), (8, 1)), "6:8", INT8, backend)


def test_every_byte_is_written_and_the_same_twice(backend: str, device: torch.device) -> None:
    run = OPERATION.runner(backend, device, torch.bfloat16)
    for k, pattern in [(33, None), (33, "2:4"), (50, "4:6"), (40, "6:8"), (31, "8:10")]:
        for dtype in (INT8, FP8):
            x = make(3, k, device=device)
            first = run(x, pattern, dtype)
            kept = [part.clone() for part in first]
            poison(first)
            del first  # the allocator hands this memory out again
            again = run(x, pattern, dtype)
            assert unwritten(again) == 0
            assert_same(again, (kept[0], kept[1]))


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("pattern", [None, "6:8"])
def test_dequantized_values_are_close(
    backend: str, device: torch.device, dtype: torch.dtype, pattern: str | None
) -> None:
    x = make(4, 128, device=device)
    q, scale = custom_quant_expand(x, pattern, dtype, backend=backend)
    back = q[:, :128].float() * scale[:, None]
    step = scale[:, None] / 2 if dtype == INT8 else x.float().abs() * 2**-4 + scale[:, None] * 2**-9
    assert ((back - x.float()).abs() <= step * 1.0001).all()


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("pattern", [None, "6:8"])
@pytest.mark.parametrize("shape", [(3,), (2, 2), (0,)])
def test_opcheck(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    pattern: str | None,
    shape: tuple[int, ...],
) -> None:
    x = make(math.prod(shape), 40, device=device).view(*shape, 40)
    # Its comparison of outputs has no kernel for float8 on the CPU.
    some: dict[str, Any] = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(
        torch.ops.custom_kernels.quant_expand,
        (x, pattern, dtype, backend),
        **(some if dtype == FP8 else {}),
    )


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    k=st.integers(1, 40),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from([INT8, FP8]),
)
def test_the_fake_output_is_shaped_and_laid_out_like_the_real_one(
    shape: list[int], k: int, pattern: str | None, dtype: torch.dtype
) -> None:
    x = torch.randn(*shape, k).bfloat16()
    real = custom_quant_expand(x, pattern, dtype)
    fake = custom_quant_expand(x.to("meta"), pattern, dtype)
    empty = empty_output(x, pattern, dtype)
    for one, two, three in zip(real, fake, empty, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)
        assert (one.shape, one.stride(), one.dtype) == (three.shape, three.stride(), three.dtype)


def test_compiles_to_one_op_without_a_graph_break(backend: str, device: torch.device) -> None:
    x = make(4, 40, device=device)
    targets: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        targets.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    compiled = torch.compile(
        lambda x: custom_quant_expand(x, "6:8", INT8, backend=backend), backend=keep, fullgraph=True
    )
    assert_same(compiled(x), reference.run(x, "6:8", INT8))
    assert sum("quant_expand" in target for target in targets) == 1


# --- errors ---------------------------------------------------------------------------------------


def one_line(error: type[Exception], message: str, *arguments: Any, **named: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        custom_quant_expand(*arguments, **named)
    assert "\n" not in str(caught.value)


def test_a_wrong_argument_is_one_clear_error() -> None:
    x = torch.ones(2, 8).bfloat16()
    one_line(ValueError, r"x must be \[\.\.\., K\] with K at least 1, got \[2, 0\]", x[:, :0])
    one_line(ValueError, r"x must be \[\.\.\., K\] .* got \[\]", x[0, 0])
    one_line(TypeError, "x must be bfloat16 or float16, got torch.float32", x.float())
    one_line(TypeError, "x must be bfloat16 or float16, got torch.int8", x.to(INT8))
    one_line(
        TypeError, "dtype must be int8 or float8_e4m3fn, got torch.uint8", x, None, torch.uint8
    )
    one_line(ValueError, "quant_expand: '68' is not a pattern; write 2:4", x, "68")
    one_line(ValueError, "quant_expand: 4:8 is not a pattern", x, "4:8")
    one_line(ValueError, "quant_expand: a pattern .* needs N from 2", x, "32:34")
    one_line(registry.BackendError, "no such backend; available:", x, backend="cudaa")
    if not torch.cuda.is_available():
        one_line(registry.BackendError, "cuda.* on cpu", x, backend="cuda")


def test_a_call_is_counted_and_an_error_is_not() -> None:
    launches.reset()
    x = torch.ones(2, 8).bfloat16()
    custom_quant_expand(x, backend="reference")
    with pytest.raises(ValueError, match="1:3"):
        custom_quant_expand(x, "1:3", backend="reference")
    assert launches.counts() == {"quant_expand.reference": 1}


# --- the cases that are measured ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_a_case_counts_the_bytes_that_move_and_sees_a_wrong_bit(dtype: str) -> None:
    case = cases.case({}, 4, 96, "6:8", dtype)
    assert case.bytes == 4 * (2 * 96 + 192 + 4)
    inputs = case.empty_inputs(torch.device("cpu"))
    case.fill(inputs)
    q, scale = reference.run(*inputs)
    assert case.error is not None
    assert case.error(inputs, (q, scale)) == 0
    wrong = q.clone()
    wrong.view(torch.uint8)[3, 5] ^= 1
    assert case.error(inputs, (wrong, scale)) == 1 / (q.numel() + 16)
    assert case.error(inputs, (q[:, :-16], scale)) == 1
    rounded = cases.Rounded(*quantize(inputs[0], q.dtype))
    assert case.error(inputs, rounded) == 0
    assert case.error(inputs, cases.Rounded(rounded.q.view(INT8) + 2, scale)) > 0.1


def test_layers_of_one_width_are_one_case() -> None:
    found = list(cases.cases(["qwen2.5-7b"], [16], "int8"))
    assert {case.labels["layer"]: case.labels["K"] for case in found} == {
        "qkv+o+gate_up": 3584,
        "down": 18944,
    }
    assert [case.labels["pattern"] for case in found[:5]] == ["none", "2:4", "4:6", "6:8", "8:10"]


# --- on a GPU -------------------------------------------------------------------------------------

WAYS = {"bulk": 0, "loads": 1, "tiles": 2}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "cupy"])
@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_capture_and_replay(gpu: torch.device, backend: str, dtype: torch.dtype) -> None:
    x = make(24, 1160, device=gpu)
    custom_quant_expand(x, "6:8", dtype, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = custom_quant_expand(x, "6:8", dtype, backend=backend)
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        poison(out)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(out, reference.run(x, "6:8", dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "cupy"])
def test_more_elements_than_32_bits_can_count(gpu: torch.device, backend: str) -> None:
    m, k = 70_000, 24_576
    x = torch.randn(m // 7, k, device=gpu, dtype=torch.bfloat16).repeat(7, 1)
    q, scale = custom_quant_expand(x, "6:8", backend=backend)
    assert x.numel() > 1.7e9
    assert q.numel() > 2**31
    for rows in (slice(0, 3), slice(58_250, 58_260), slice(m - 3, m)):
        assert_same((q[rows], scale[rows]), reference.run(x[rows], "6:8", INT8))


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [None, "2:4", "4:6", "6:8", "8:10", "12:14", "30:32"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_the_cuda_kernel(gpu: torch.device, way: str, pattern: str | None) -> None:
    by = OPERATION.backend("cuda").library(gpu)["quant_expand_by"]
    for m, k in [(1, 8), (5, 1024), (37, 3592), (300, 896)]:
        for warps, teams in [(1, 1), (1, 12), (3, 4), (16, 1)] if way != "tiles" else [(8, 1)]:
            for dtype in (INT8, FP8):
                x = make(m, k, device=gpu)
                out = empty_output(x, pattern, dtype)
                poison(out)
                by(x, pattern, *out, WAYS[way], warps, teams)
                assert_same(out, reference.run(x, pattern, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "cupy"])
@pytest.mark.parametrize("k", [20_001, 65_544, 150_008])
def test_long_rows(gpu: torch.device, backend: str, k: int) -> None:
    x = make(3, k, device=gpu)
    for pattern in (None, "4:6", "6:8", "10:12"):
        assert_right(x, pattern, FP8, backend)


@pytest.mark.parametrize(
    "backend",
    [
        "reference",
        *(pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton", "cupy")),
    ],
)
def test_65536_tokens_in_one_batch_are_each_what_they_are_alone(
    request: pytest.FixtureRequest, backend: str
) -> None:
    """With a GPU x has more than 2³¹ values: offsets of 32 bits would overflow."""
    device = torch.device("cpu") if backend == "reference" else request.getfixturevalue("gpu")
    tokens, k = 65_536, 24 if backend == "reference" else 32_832
    x = torch.randn(64, k, device=device).bfloat16().repeat(tokens // 64, 1)
    found = custom_quant_expand(x, "6:8", INT8, backend=backend)
    wanted = reference.run(x[:64], "6:8", INT8)
    for part in (slice(0, 64), slice(tokens // 2, tokens // 2 + 64), slice(tokens - 64, tokens)):
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one[part], other)


@pytest.mark.gpu
def test_kernels_that_overlap_in_a_stream_wait_for_each_other(gpu: torch.device) -> None:
    """The input is written by the kernel right before, the output reused by the one right after."""
    x = make(512, 3584, device=gpu)
    sources = [make(512, 3584, device=gpu) for _ in range(4)]
    rights = [reference.run(source, "6:8", INT8) for source in sources]
    run = OPERATION.backend("cuda").library(gpu)["quant_expand"]
    out = empty_output(x, "6:8", INT8)
    kept = [tuple(torch.empty_like(part) for part in out) for _ in range(40)]
    for i in range(40):
        torch.mul(sources[i % 4], 1, out=x)
        run(x, "6:8", INT8, *out)
        run(x, "6:8", INT8, *out)
        for to, part in zip(kept[i], out, strict=True):
            torch.add(part, 0, out=to)
    for i in range(40):
        assert_same((kept[i][0], kept[i][1]), rights[i % 4])
