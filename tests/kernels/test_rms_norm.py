# SPDX-License-Identifier: Apache-2.0
"""custom_rms_norm: every backend against the exact result, its argument checks, and how it behaves
under torch and CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_kernels import custom_rms_norm, launches
from custom_kernels.check.outputs import poison, unwritten
from custom_kernels.rms_norm import DTYPES, OPERATION, cases, reference
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

# Each output is off by at most this share of the exact value: two roundings, and the third that
# Triton's interpreter has by truncating what it loads.
RTOL = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-19}
EPSILON = 1e-6

# Special rows overflow; the interpreter computes with NumPy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero)")


@pytest.fixture(params=OPERATION.backend_names())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that the folder holds."""
    return str(request.param)


def weight_of(k: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    return (1 + torch.randn(k, device=device) / 5).to(dtype)


def assert_right(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    backend: str,
    epsilon: float = EPSILON,
) -> tuple[torch.Tensor, torch.Tensor]:
    got = custom_rms_norm(x, residual, weight, epsilon, backend=backend)
    for one, right in zip(got, reference.exact(x, residual, weight, epsilon), strict=True):
        assert (one.shape, one.dtype, one.is_contiguous()) == (right.shape, x.dtype, True)
        rtol = RTOL[x.dtype]
        torch.testing.assert_close(one.double(), right, rtol=rtol, atol=1e-7, equal_nan=True)
    return got


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    m=st.integers(0, 5),
    k=st.one_of(st.integers(1, 130), st.sampled_from([256, 600])),
    dtype=st.sampled_from(DTYPES),
    residual=st.booleans(),
    weight=st.sampled_from(["x", "float32", None]),
    more=st.sampled_from([0, 0, 1, 8]),
    offset=st.sampled_from([0, 0, 1, 8]),
)
@example(2, 4096, torch.bfloat16, True, "x", 0, 0)
@example(3, 97, torch.float16, True, "float32", 3, 1)
@example(1, 1, torch.float32, False, None, 0, 0)
def test_any_shape_and_layout(
    backend: str,
    device: torch.device,
    m: int,
    k: int,
    dtype: torch.dtype,
    residual: bool,
    weight: str | None,
    more: int,
    offset: int,
) -> None:
    torch.manual_seed(m * 7919 + k)

    def rows() -> torch.Tensor:
        memory = torch.randn(offset + m * (k + more) + 1, device=device).to(dtype)
        return memory[offset : offset + m * (k + more)].view(m, k + more)[:, :k]

    gains = weight_of(k, dtype if weight == "x" else torch.float32, device) if weight else None
    assert_right(rows(), rows() if residual else None, gains, backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_rows(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    k = 72
    x = torch.randn(6, k, device=device).to(dtype)
    x[0] = 0
    x[1] = -0.0
    x[2, 3] = math.inf
    x[3, 5] = math.nan
    x[4] *= 1e-4  # small beside epsilon, in float16 subnormal
    weight = weight_of(k, dtype, device)
    for residual in (None, torch.zeros_like(x)):
        y, _ = custom_rms_norm(x, residual, weight, 1e-5, backend=backend)
        assert y[:2].eq(0).all()
        assert y[2, 3].isnan()
        assert y[3].isnan().all()
        ordinary = x[4:].contiguous()
        assert_right(ordinary, None if residual is None else residual[4:], weight, backend, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_has_the_root_mean_square_one(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    x = (torch.randn(4, 512, device=device) * 10).to(dtype)
    y, _ = custom_rms_norm(x, x, None, 0.0, backend=backend)
    rms = y.double().square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), rtol=RTOL[dtype], atol=0)


def test_the_reference_rounds_where_vllm_does() -> None:
    """Written out, as vLLM's native norm computes it."""
    x, residual = (torch.randn(64, 896).bfloat16() for _ in range(2))
    for weight in (weight_of(896, torch.bfloat16), weight_of(896, torch.float32)):
        for other in (None, residual):
            y, total = reference.run(x, other, weight, EPSILON)
            values = x.float() if other is None else x.float() + other.float()
            factor = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + EPSILON)
            right = ((values * factor).to(weight.dtype) * weight).to(x.dtype)
            different = y != right
            assert float(different.float().mean()) < 1e-3  # the sum's order
            # Another order can end either rounding, before and after the weight, one unit away.
            torch.testing.assert_close(y, right, rtol=RTOL[x.dtype], atol=0)
            if other is not None:
                assert torch.equal(total, values.to(x.dtype))


def test_leading_dimensions_are_kept(backend: str, device: torch.device) -> None:
    x, residual = (torch.randn(6, 80, device=device).half() for _ in range(2))
    weight = weight_of(80, torch.float16, device)
    flat = custom_rms_norm(x, residual, weight, EPSILON, backend=backend)
    for shape in [(2, 3), (1, 6), (3, 1, 2)]:
        got = custom_rms_norm(
            x.view(*shape, 80), residual.view(*shape, 80), weight, EPSILON, backend=backend
        )
        for one, other in zip(got, flat, strict=True):
            assert torch.equal(one, other.view(*shape, 80))
    y, total = custom_rms_norm(x[0], None, weight, EPSILON, backend=backend)
    assert (y.shape, total.shape) == ((80,), (0,))


def test_nothing_is_written_in_place(backend: str, device: torch.device) -> None:
    given = [torch.randn(3, 40, device=device) for _ in range(2)]
    given.append(weight_of(40, torch.float32, device))
    before = [one.clone() for one in given]
    got = custom_rms_norm(*given, EPSILON, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))
    assert not {one.data_ptr() for one in got} & {one.data_ptr() for one in given}


@pytest.mark.parametrize("residual", [True, False])
def test_opcheck(backend: str, device: torch.device, residual: bool) -> None:
    for shape in [(3,), (2, 2), (0,)]:
        x = torch.randn(*shape, 40, device=device).bfloat16()
        weight = weight_of(40, torch.bfloat16, device)
        other = x.clone() if residual else None
        arguments = (x, other, weight, EPSILON, weight, backend)
        torch.library.opcheck(torch.ops.custom_kernels.rms_norm, arguments)


def test_compiles_to_one_op_without_a_graph_break(backend: str, device: torch.device) -> None:
    x = torch.randn(4, 40, device=device)
    targets: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        targets.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    def call(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return custom_rms_norm(x, x, None, EPSILON, backend=backend)

    compiled = torch.compile(call, backend=keep, fullgraph=True)
    assert all(torch.equal(one, two) for one, two in zip(compiled(x), call(x), strict=True))
    assert sum("rms_norm" in target for target in targets) == 1


def test_a_wrong_argument_is_one_clear_error() -> None:
    x, weight = torch.ones(2, 8).bfloat16(), torch.ones(8).bfloat16()

    def bad(error: type[Exception], message: str, *given: Any) -> None:
        with pytest.raises(error, match=f"rms_norm: {message}") as caught:
            custom_rms_norm(*given, EPSILON)
        assert "\n" not in str(caught.value)

    bad(ValueError, r"x must be \[\.\.\., K\] with K at least 1", x[:, :0], None, weight[:0])
    bad(ValueError, r"weight must be \[8\] like a row of x, got \[4\]", x, None, weight[:4])
    bad(ValueError, r"residual must be \[2, 8\] like x, got \[1, 8\]", x, x[:1], weight)
    bad(TypeError, "residual must be torch.bfloat16 like x, got torch.float32", x, x.float(), None)
    bad(TypeError, "weight must be torch.bfloat16 like x, or torch.float32", x, None, weight.half())
    bad(TypeError, "x must be bfloat16, float16 or float32, got torch.float64", x.double(), x, None)
    bad(ValueError, "weight must be on cpu like x, got meta", x, None, weight.to("meta"))


def test_calls_are_counted_by_layer_and_errors_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launches.ENVIRONMENT, str(tmp_path))
    launches.reset()
    x, weight = torch.ones(2, 8), torch.ones(8)
    launches.layer("model.norm", weight.data_ptr())
    custom_rms_norm(x, None, weight, EPSILON, layer=weight)
    custom_rms_norm(x, None, weight, EPSILON)
    with pytest.raises(ValueError, match="residual"):
        custom_rms_norm(x, x[:1], weight, EPSILON, layer=weight)
    (by_layer,) = launches.read_layers(tmp_path).values()
    assert by_layer == {"model.norm": {"rms_norm.reference": 1}}
    assert launches.counts() == {"rms_norm.reference": 2}
    launches.reset()


def test_a_case_counts_the_bytes_that_move() -> None:
    assert cases.case({}, 4, 96, "bfloat16").bytes == 4 * 96 * 8 + 96 * 2
    assert cases.case({}, 4, 96, "float32", residual=False).bytes == 4 * 96 * 8 + 96 * 4


# --- on a GPU -------------------------------------------------------------------------------------

GPU_BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton", "cupy"])
Call = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.mark.gpu
@GPU_BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 64, 133, 5000])
def test_models_shapes(gpu: torch.device, backend: str, m: int, dtype: torch.dtype) -> None:
    for k in (64, 128, 896, 3584, 8192, 20000):
        x, residual = (torch.randn(m, k, device=gpu).to(dtype) for _ in range(2))
        weight = weight_of(k, dtype, gpu)
        assert_right(x, residual, weight, backend)
        assert_right(x, None, weight, backend)


@pytest.mark.gpu
@GPU_BACKENDS
def test_capture_and_replay(gpu: torch.device, backend: str) -> None:
    x, residual = (torch.randn(24, 1160, device=gpu).bfloat16() for _ in range(2))
    weight = weight_of(1160, torch.bfloat16, gpu)
    custom_rms_norm(x, residual, weight, EPSILON, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = custom_rms_norm(x, residual, weight, EPSILON, backend=backend)
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        residual.normal_()
        poison(out)
        graph.replay()
        torch.cuda.synchronize()
        assert unwritten(out) == 0
        again = custom_rms_norm(x, residual, weight, EPSILON, backend=backend)
        assert all(torch.equal(one, two) for one, two in zip(out, again, strict=True))
        assert_right(x, residual, weight, backend)


@pytest.mark.gpu
@GPU_BACKENDS
def test_more_elements_than_32_bits_can_count(gpu: torch.device, backend: str) -> None:
    m, k = 300_000, 8192
    x = torch.randn(m // 6, k, device=gpu, dtype=torch.bfloat16).repeat(6, 1)
    weight = weight_of(k, torch.bfloat16, gpu)
    assert x.numel() > 2**31
    y, total = custom_rms_norm(x, x, weight, EPSILON, backend=backend)
    right, right_total = assert_right(x[-3:], x[-3:], weight, backend)
    torch.testing.assert_close(y[-3:], right, rtol=2**-6, atol=0)
    assert torch.equal(total[-3:], right_total)


@pytest.mark.gpu
def test_kernels_that_overlap_in_a_stream_wait_for_each_other(gpu: torch.device) -> None:
    """Each kernel's input is written by the one right before it, as in a layer."""
    m, k = 512, 3584
    weight = weight_of(k, torch.bfloat16, gpu)
    sources = [torch.randn(m, 2 * k, device=gpu).bfloat16() for _ in range(4)]
    x = torch.empty_like(sources[0])

    def chain() -> tuple[torch.Tensor, ...]:
        left, right = x[:, :k], x[:, k:]
        y, total = custom_rms_norm(left, right, weight, EPSILON, backend="cuda")
        return y, *custom_rms_norm(y, total, weight, EPSILON, backend="cuda")

    rights = []
    for source in sources:
        x.copy_(source)
        torch.cuda.synchronize()
        rights.append(chain())
        torch.cuda.synchronize()
    found = []
    for i in range(40):
        torch.mul(sources[i % 4], 1, out=x)
        found.append(chain())
    for i, parts in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(parts, rights[i % 4], strict=True))
