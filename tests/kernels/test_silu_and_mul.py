# SPDX-License-Identifier: Apache-2.0
"""custom_silu_and_mul: every backend against the exact result, its argument checks, and how it
behaves under torch and CUDA graphs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_kernels import custom_silu_and_mul, launches
from custom_kernels.check.outputs import poison, unwritten
from custom_kernels.silu_and_mul import DTYPES, OPERATION, cases, reference
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

# Each output is off by at most this share of the exact value: two roundings, and in float32 the
# exponential function's.
RTOL = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-18}
# Of float16 the smallest values are subnormal, and up is as large as 60.
ATOL = {torch.bfloat16: 1e-30, torch.float16: 60 * 2**-24, torch.float32: 1e-30}

# The interpreter computes with NumPy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")


@pytest.fixture(params=OPERATION.backend_names())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that the folder holds."""
    return str(request.param)


def assert_right(x: torch.Tensor, backend: str) -> torch.Tensor:
    y = custom_silu_and_mul(x, backend=backend)
    right = reference.exact(x)
    assert (y.shape, y.dtype, y.is_contiguous()) == (right.shape, x.dtype, True)
    torch.testing.assert_close(y.double(), right, rtol=RTOL[x.dtype], atol=ATOL[x.dtype])
    return y


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    m=st.integers(0, 5),
    k=st.one_of(st.integers(1, 130), st.sampled_from([256, 600])),
    dtype=st.sampled_from(DTYPES),
    more=st.sampled_from([0, 0, 1, 8]),
    offset=st.sampled_from([0, 0, 1, 8]),
)
@example(2, 4104, torch.bfloat16, 0, 0)
@example(3, 97, torch.float16, 3, 1)
@example(1, 1, torch.float32, 0, 0)
def test_any_shape_and_layout(
    backend: str, device: torch.device, m: int, k: int, dtype: torch.dtype, more: int, offset: int
) -> None:
    torch.manual_seed(m * 7919 + k)
    width = 2 * k + more
    memory = (2 * torch.randn(offset + m * width + 1, device=device)).to(dtype)
    assert_right(memory[offset : offset + m * width].view(m, width)[:, : 2 * k], backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_every_size(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """From where the exponential function is infinite to where it is zero."""
    gate = torch.linspace(-80, 80, 1601, device=device).to(dtype)
    assert_right(torch.cat([gate, torch.full_like(gate, 3)])[None], backend)
    far = torch.tensor([[-200.0, -90.0, 0.0, -0.0, 200.0, 1, 1, 1, 1, 1]], device=device).to(dtype)
    y = custom_silu_and_mul(far, backend=backend)
    assert y[0, :4].abs().le(1e-6).all()
    assert y[0, 4] == 200


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_in_its_place(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    x = torch.ones(2, 32, device=device).to(dtype)
    x[0, 1] = x[0, 16 + 2] = math.nan
    x[0, 3] = math.inf
    y = custom_silu_and_mul(x, backend=backend)
    assert y.isnan().nonzero().tolist() == [[0, 1], [0, 2]]
    assert y.isinf().nonzero().tolist() == [[0, 3]]


def test_leading_dimensions_are_kept(backend: str, device: torch.device) -> None:
    x = torch.randn(6, 80, device=device).half()
    flat = custom_silu_and_mul(x, backend=backend)
    for shape in [(2, 3), (1, 6), (3, 1, 2)]:
        got = custom_silu_and_mul(x.view(*shape, 80), backend=backend)
        assert torch.equal(got, flat.view(*shape, 40))
    assert custom_silu_and_mul(x[0], backend=backend).shape == (40,)


def test_opcheck(backend: str, device: torch.device) -> None:
    for shape in [(3,), (0,)]:
        x = torch.randn(*shape, 40, device=device).bfloat16()
        torch.library.opcheck(torch.ops.custom_kernels.silu_and_mul, (x, x, backend))


def test_a_wrong_argument_is_one_clear_error() -> None:
    x = torch.ones(2, 8).bfloat16()

    def bad(error: type[Exception], message: str, *given: Any) -> None:
        with pytest.raises(error, match=f"silu_and_mul: {message}") as caught:
            custom_silu_and_mul(*given)
        assert "\n" not in str(caught.value)

    bad(ValueError, r"x must be \[\.\.\., 2K\] with K at least 1, got \[2, 7\]", x[:, :7])
    bad(ValueError, r"x must be \[\.\.\., 2K\] with K at least 1, got \[2, 0\]", x[:, :0])
    bad(TypeError, "x must be bfloat16, float16 or float32, got torch.float64", x.double())


def test_calls_are_counted_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launches.ENVIRONMENT, str(tmp_path))
    launches.reset()
    x, key = torch.ones(2, 8), torch.ones(1)
    launches.layer("model.act", key.data_ptr())
    custom_silu_and_mul(x, layer=key)
    custom_silu_and_mul(x)
    (by_layer,) = launches.read_layers(tmp_path).values()
    assert by_layer == {"model.act": {"silu_and_mul.reference": 1}}
    assert launches.counts() == {"silu_and_mul.reference": 2}
    launches.reset()


def test_a_case_counts_the_bytes_that_move() -> None:
    assert cases.case({}, 4, 96, "bfloat16").bytes == 4 * 96 * 6


# --- on a GPU -------------------------------------------------------------------------------------

GPU_BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton", "cupy"])


@pytest.mark.gpu
@GPU_BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 64, 133, 5000])
def test_models_shapes(gpu: torch.device, backend: str, m: int, dtype: torch.dtype) -> None:
    for k in (8, 768, 4864, 18944):
        assert_right(torch.randn(m, 2 * k, device=gpu).to(dtype), backend)


@pytest.mark.gpu
@GPU_BACKENDS
def test_capture_and_replay(gpu: torch.device, backend: str) -> None:
    x = torch.randn(24, 2320, device=gpu).bfloat16()
    custom_silu_and_mul(x, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = custom_silu_and_mul(x, backend=backend)
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        poison(out)
        graph.replay()
        torch.cuda.synchronize()
        assert unwritten(out) == 0
        assert torch.equal(out, assert_right(x, backend))


@pytest.mark.gpu
@GPU_BACKENDS
def test_more_elements_than_32_bits_can_count(gpu: torch.device, backend: str) -> None:
    m, k = 300_000, 8192
    x = torch.randn(m // 6, k, device=gpu, dtype=torch.bfloat16).repeat(6, 1)
    assert x.numel() > 2**31
    y = custom_silu_and_mul(x, backend=backend)
    assert torch.equal(y[-3:], assert_right(x[-3:], backend))


@pytest.mark.gpu
def test_kernels_that_overlap_in_a_stream_wait_for_each_other(gpu: torch.device) -> None:
    """Each kernel's input is written by the one right before it, as in a layer."""
    sources = [torch.randn(512, 4096, device=gpu).bfloat16() for _ in range(4)]
    x = torch.empty_like(sources[0])

    def chain() -> torch.Tensor:
        return custom_silu_and_mul(custom_silu_and_mul(x, backend="cuda"), backend="cuda")

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
    assert all(torch.equal(one, rights[i % 4]) for i, one in enumerate(found))
