# SPDX-License-Identifier: Apache-2.0
"""custom_rotary_embedding: every backend against the exact result, its argument checks, and how it
behaves under torch and CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from custom_kernels import custom_rotary_embedding, launches
from custom_kernels.check.outputs import poison, unwritten
from custom_kernels.rotary_embedding import DTYPES, OPERATION, cases, reference
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

# Each output is off by at most this share of the exact value or, where products cancel, of one:
# rounded once.
RTOL = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}


@pytest.fixture(params=OPERATION.backend_names())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that the folder holds."""
    return str(request.param)


def cache_of(
    positions: int, rotary: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    frequencies = 10_000 ** -(torch.arange(0, rotary, 2, device=device) / rotary)
    angles = torch.arange(positions, device=device)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1).to(dtype)


def assert_right(
    query: torch.Tensor,
    key: torch.Tensor | None,
    positions: torch.Tensor,
    cache: torch.Tensor,
    head_size: int,
    is_neox: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    got = custom_rotary_embedding(query, key, positions, cache, head_size, is_neox, backend=backend)
    flat = [None if one is None else one.flatten(1) for one in (query, key)]
    assert flat[0] is not None
    rights = reference.exact(flat[0], flat[1], positions, cache, head_size, is_neox)
    assert (got[1] is None) == (key is None)
    for one, given_one, right in zip(got, (query, key), rights, strict=True):
        if one is not None and given_one is not None:
            assert (one.shape, one.dtype) == (given_one.shape, given_one.dtype)
            assert one.is_contiguous()
            rtol = RTOL[query.dtype]
            torch.testing.assert_close(one.flatten(1).double(), right, rtol=rtol, atol=rtol / 16)
    return got


def projection(
    m: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Slices of one projection, as vLLM has them."""
    split = [heads * head_size, kv_heads * head_size, kv_heads * head_size]
    memory = torch.randn(offset + m * sum(split), device=device).to(dtype)
    query, key, _ = memory[offset:].view(m, sum(split)).split(split, -1)
    return query, key if kv_heads else None


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    m=st.integers(0, 4),
    heads=st.integers(1, 5),
    kv_heads=st.integers(0, 3),
    head_size=st.sampled_from([2, 7, 16, 64, 80, 96]),
    share=st.sampled_from([1.0, 1.0, 0.5, 0.3]),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    is_neox=st.booleans(),
    offset=st.sampled_from([0, 0, 1, 8]),
)
@example(3, 4, 2, 64, 1.0, torch.bfloat16, False, True, 0)
@example(3, 4, 2, 64, 1.0, torch.bfloat16, False, False, 0)
@example(2, 3, 1, 80, 0.5, torch.float16, True, True, 3)
def test_any_shape_and_layout(
    backend: str,
    device: torch.device,
    m: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    share: float,
    dtype: torch.dtype,
    wide: bool,
    is_neox: bool,
    offset: int,
) -> None:
    torch.manual_seed(m * 7919 + head_size)
    query, key = projection(m, heads, kv_heads, head_size, dtype, device, offset)
    rotary = max(2, int(head_size * share) // 2 * 2)
    cache = cache_of(100, rotary, torch.float32 if wide else dtype, device)
    positions = torch.randint(0, 100, (m,), device=device)
    assert_right(query, key, positions, cache, head_size, is_neox, backend)


@pytest.mark.parametrize("is_neox", [True, False])
def test_position_zero_changes_nothing_and_lengths_stay(
    backend: str, device: torch.device, is_neox: bool
) -> None:
    query, key = projection(4, 2, 1, 64, torch.float32, device)
    positions = torch.tensor([0, 1, 50, 99], device=device)
    cache = cache_of(100, 64, torch.float32, device)
    got, _ = custom_rotary_embedding(query, key, positions, cache, 64, is_neox, backend=backend)
    assert torch.equal(got[0], query[0])
    assert not torch.equal(got[1], query[1])
    torch.testing.assert_close(got.norm(dim=-1), query.norm(dim=-1), rtol=1e-5, atol=0)


def test_heads_may_be_a_dimension(backend: str, device: torch.device) -> None:
    query, key = projection(3, 4, 2, 64, torch.float16, device)
    assert key is not None
    positions = torch.tensor([5, 0, 7], device=device)
    cache = cache_of(8, 64, torch.float16, device)
    flat = custom_rotary_embedding(query, key, positions, cache, 64, True, backend=backend)
    heads = [one.unflatten(1, (-1, 64)) for one in (query, key)]
    got = custom_rotary_embedding(*heads, positions, cache, 64, True, backend=backend)
    for one, other in zip(got, flat, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other.unflatten(1, (-1, 64)))
    swapped = heads[0].transpose(1, 2).contiguous().transpose(1, 2)
    got, none = custom_rotary_embedding(swapped, None, positions, cache, 64, True, backend=backend)
    assert torch.equal(got.flatten(1), flat[0])
    assert none is None


def test_nothing_is_written_in_place(backend: str, device: torch.device) -> None:
    query, key = projection(3, 2, 1, 64, torch.float32, device)
    assert key is not None
    before = query.clone(), key.clone()
    positions = torch.tensor([0, 0, 3], device=device)
    cache = cache_of(8, 64, torch.float32, device)
    got, _ = custom_rotary_embedding(query, key, positions, cache, 64, True, backend=backend)
    assert torch.equal(query, before[0])
    assert torch.equal(key, before[1])
    assert got.data_ptr() != query.data_ptr()


@pytest.mark.parametrize("kv_heads", [0, 1])
def test_opcheck(backend: str, device: torch.device, kv_heads: int) -> None:
    cache = cache_of(8, 32, torch.bfloat16, device)
    for m in (3, 0):
        query, key = projection(m, 2, kv_heads, 64, torch.bfloat16, device)
        if m == 0:  # opcheck cannot copy slices without rows
            query, key = (None if one is None else one.new_empty(one.shape) for one in (query, key))
        positions = torch.arange(m, device=device)
        arguments = (query, key, positions, cache, 64, True, cache, backend)
        torch.library.opcheck(torch.ops.custom_kernels.rotary_embedding, arguments)


def test_a_wrong_argument_is_one_clear_error() -> None:
    query, key = projection(2, 2, 1, 8, torch.float16)
    assert key is not None
    positions, cache = torch.arange(2), cache_of(4, 8, torch.float16)

    def bad(error: type[Exception], message: str, *given: Any) -> None:
        with pytest.raises(error, match=f"rotary_embedding: {message}") as caught:
            custom_rotary_embedding(*given, True)
        assert "\n" not in str(caught.value)

    bad(ValueError, r"query must be \[M, heads · 5\] or", query, key, positions, cache, 5)
    bad(ValueError, r"key must have 2 rows like query, got 1", query, key[:1], positions, cache, 8)
    bad(TypeError, "key must be torch.float16 like", query, key.float(), positions, cache, 8)
    bad(ValueError, r"positions must be \[2\] int64", query, key, positions[:1], cache, 8)
    bad(ValueError, r"positions must be \[2\] int64", query, key, positions.int(), cache, 8)
    bad(ValueError, "cos_sin_cache must be .* an even R", query, key, positions, cache[:, :3], 8)
    bad(ValueError, r"cos_sin_cache must be .*at most 4, got", query, key, positions, cache, 4)
    bad(TypeError, "cos_sin_cache must be torch.float16", query, key, positions, cache.double(), 8)
    bad(TypeError, "query must be bfloat16", query.double(), key, positions, cache, 8)
    bad(ValueError, "key must be on cpu like", query, key.to("meta"), positions, cache, 8)
    bad(ValueError, "query and key must have a head", query[:, :0], None, positions, cache, 8)


def test_calls_are_counted_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launches.ENVIRONMENT, str(tmp_path))
    launches.reset()
    query, key = projection(2, 2, 1, 8, torch.float16)
    cache = cache_of(4, 8, torch.float16)
    launches.layer("model.rotary", cache.data_ptr())
    custom_rotary_embedding(query, key, torch.arange(2), cache, 8, True, layer=cache)
    custom_rotary_embedding(query, key, torch.arange(2), cache, 8, True)
    (by_layer,) = launches.read_layers(tmp_path).values()
    assert by_layer == {"model.rotary": {"rotary_embedding.reference": 1}}
    assert launches.counts() == {"rotary_embedding.reference": 2}
    launches.reset()


def test_a_case_counts_the_bytes_that_move() -> None:
    case = cases.case({}, 4, 3, 1, 64, "bfloat16")
    assert case.bytes == 4 * (2 * 4 * 64 * 2 + 8) + 4 * 64 * 2


# --- on a GPU -------------------------------------------------------------------------------------

GPU_BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton", "cupy"])


@pytest.mark.gpu
@GPU_BACKENDS
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("m", [1, 64, 133, 5000])
def test_models_shapes(gpu: torch.device, backend: str, m: int, is_neox: bool) -> None:
    shapes = ((14, 2, 64, 64), (28, 4, 128, 128), (96, 8, 128, 64))
    for dtype in DTYPES:
        for heads, kv_heads, head_size, rotary in shapes:
            query, key = projection(m, heads, kv_heads, head_size, dtype, gpu)
            cache = cache_of(4096, rotary, dtype, gpu)
            positions = torch.randint(0, 4096, (m,), device=gpu)
            assert_right(query, key, positions, cache, head_size, is_neox, backend)


@pytest.mark.gpu
@GPU_BACKENDS
def test_capture_and_replay(gpu: torch.device, backend: str) -> None:
    query, key = projection(24, 4, 2, 128, torch.bfloat16, gpu)
    assert key is not None
    cache = cache_of(64, 128, torch.bfloat16, gpu)
    positions = torch.zeros(24, dtype=torch.int64, device=gpu)
    custom_rotary_embedding(query, key, positions, cache, 128, True, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = custom_rotary_embedding(query, key, positions, cache, 128, True, backend=backend)
    for seed in range(3):
        torch.manual_seed(seed)
        query.normal_()
        key.normal_()
        positions.random_(0, 64)
        poison(out)
        graph.replay()
        torch.cuda.synchronize()
        assert unwritten(out) == 0
        right = assert_right(query, key, positions, cache, 128, True, backend)
        for one, other in zip(out, right, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)


@pytest.mark.gpu
@GPU_BACKENDS
def test_more_elements_than_32_bits_can_count(gpu: torch.device, backend: str) -> None:
    m = 300_000
    query = torch.randn(m // 6, 64 * 128, device=gpu, dtype=torch.bfloat16).repeat(6, 1)
    assert query.numel() > 2**31
    cache = cache_of(64, 128, torch.bfloat16, gpu)
    positions = torch.arange(m, device=gpu) % 64
    got, _ = custom_rotary_embedding(query, None, positions, cache, 128, True, backend=backend)
    right, _ = assert_right(query[-3:], None, positions[-3:], cache, 128, True, backend)
    assert torch.equal(got[-3:], right)


@pytest.mark.gpu
def test_kernels_that_overlap_in_a_stream_wait_for_each_other(gpu: torch.device) -> None:
    """Each kernel's input is written by the one right before it, as in a layer."""
    sources = [projection(512, 28, 4, 128, torch.bfloat16, gpu)[0] for _ in range(4)]
    cache = cache_of(512, 128, torch.bfloat16, gpu)
    positions = torch.arange(512, device=gpu)
    x = torch.empty_like(sources[0])

    def chain() -> torch.Tensor:
        once, _ = custom_rotary_embedding(x, None, positions, cache, 128, True, backend="cuda")
        twice, _ = custom_rotary_embedding(once, None, positions, cache, 128, True, backend="cuda")
        return twice

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
