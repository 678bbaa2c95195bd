# SPDX-License-Identifier: Apache-2.0
"""custom_paged_attention: every backend against the exact result, its argument checks, and how it
behaves under torch and CUDA graphs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from custom_kernels import custom_paged_attention, launches
from custom_kernels.check.outputs import poison, unwritten
from custom_kernels.paged_attention import DTYPES, OPERATION, cases, reference
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

# Each output is off by at most this share of the largest value, of which it is a weighted mean: y
# is rounded once, and on a GPU so are the weights.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-19}


class Inputs(NamedTuple):
    query: torch.Tensor
    key_pages: torch.Tensor
    value_pages: torch.Tensor
    block_table: torch.Tensor
    lengths: torch.Tensor
    scale: float


@pytest.fixture(params=OPERATION.backend_names())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that the folder holds."""
    return str(request.param)


def made(
    lengths: list[int],
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 32,
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    heads_first: bool = True,
) -> Inputs:
    """Random numbers. The pages are in a random order; those that no sequence has, places behind a
    sequence's end, and what the table says behind its last page are poison."""
    batch = len(lengths)
    width = max([-(-length // page) for length in lengths], default=0) + 1
    used = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(used) + 3)
    shape = (kv_heads, page) if heads_first else (page, kv_heads)
    cache = torch.full((len(order), *shape, 2 * size), math.nan)
    by_token = cache.transpose(1, 2) if heads_first else cache
    table = torch.full((batch, width), 2**30, dtype=torch.int32)
    for one, length in enumerate(lengths):
        pages, order = order[: used[one]], order[used[one] :]
        table[one, : used[one]] = pages
        tokens = torch.arange(length)
        by_token[pages[tokens // page], tokens % page] = torch.randn(length, kv_heads, 2 * size)
    keys, values = by_token.to(device, dtype).split(size, -1)
    return Inputs(
        torch.randn(batch, heads, size).to(device, dtype),
        keys,
        values,
        table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        size**-0.5,
    )


def assert_right(inputs: Inputs, backend: str) -> torch.Tensor:
    y = custom_paged_attention(*inputs, backend=backend)
    right = reference.exact(*inputs)
    assert (y.shape, y.dtype, y.is_contiguous()) == (right.shape, inputs.query.dtype, True)
    largest = inputs.value_pages.nan_to_num().abs().max().item() if right.numel() else 0
    atol = TOLERANCE[y.dtype] * largest
    torch.testing.assert_close(y.double(), right, rtol=0, atol=atol)
    return y


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.one_of(st.integers(0, 40), st.sampled_from([130, 257])), max_size=4),
    group=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    size=st.sampled_from([1, 24, 32, 64, 80]),
    page=st.sampled_from([1, 16, 24, 128]),
    dtype=st.sampled_from(DTYPES),
    heads_first=st.booleans(),
)
@example([1], 7, 2, 128, 16, torch.bfloat16, True)
@example([0, 0], 1, 1, 32, 16, torch.float16, False)
@example([800], 17, 1, 16, 16, torch.float32, True)  # in parts; more heads than a tile has rows
def test_any_shape_and_layout(
    backend: str,
    device: torch.device,
    lengths: list[int],
    group: int,
    kv_heads: int,
    size: int,
    page: int,
    dtype: torch.dtype,
    heads_first: bool,
) -> None:
    torch.manual_seed(sum(lengths) * 7919 + size)
    heads = group * kv_heads
    assert_right(made(lengths, heads, kv_heads, size, page, dtype, device, heads_first), backend)


def test_the_definition_is_that_of_torch() -> None:
    """Without pages, on one sequence after the other."""
    inputs = made([5, 37], heads=6, kv_heads=3, page=4, dtype=torch.float64)
    for one, length in enumerate(inputs.lengths.tolist()):
        table = inputs.block_table[one, : -(-length // 4)]
        keys, values = (
            pages[table].flatten(0, 1)[:length].transpose(0, 1)
            for pages in (inputs.key_pages, inputs.value_pages)
        )
        right = torch.nn.functional.scaled_dot_product_attention(
            inputs.query[one][:, None], keys, values, scale=inputs.scale, enable_gqa=True
        )
        torch.testing.assert_close(reference.exact(*inputs)[one], right[:, 0])


def test_equal_scores_give_the_mean_and_a_high_one_its_value(
    backend: str, device: torch.device
) -> None:
    inputs = made([600, 3], device=device)
    inputs.query.zero_()
    y = assert_right(inputs, backend)
    table = inputs.block_table[1, 0]
    mean = inputs.value_pages[table, :3].mean(0).repeat_interleave(2, 0)
    torch.testing.assert_close(y[1], mean, rtol=0, atol=1e-5)
    inputs.query.fill_(1)
    inputs.key_pages[inputs.block_table[0, 20], 7] = 1000.0
    y = custom_paged_attention(*inputs, backend=backend)
    chosen = inputs.value_pages[inputs.block_table[0, 20], 7].repeat_interleave(2, 0)
    assert torch.equal(y[0], chosen)


def test_a_row_does_not_depend_on_the_others(backend: str, device: torch.device) -> None:
    """Of a batch that fills up a CUDA graph, too: its last rows have no tokens, and no pages."""
    inputs = made([20, 45, 7], device=device)
    whole = custom_paged_attention(*inputs, backend=backend)
    for one in range(3):
        row = slice(one, one + 1)
        alone = inputs._replace(
            query=inputs.query[row],
            block_table=inputs.block_table[row],
            lengths=inputs.lengths[row],
        )
        torch.testing.assert_close(custom_paged_attention(*alone, backend=backend), whole[row])
    inputs.lengths[2] = 0
    inputs.query[2] = math.nan
    filled = custom_paged_attention(*inputs, backend=backend)
    torch.testing.assert_close(filled[:2], whole[:2])


def test_views_of_a_projection_are_read_where_they_are(backend: str, device: torch.device) -> None:
    inputs = made([20, 45], heads=4, kv_heads=2, size=32, device=device)
    qkv = torch.randn(2, (4 + 2 + 2) * 32, device=device)
    query = qkv[:, : 4 * 32].unflatten(1, (4, 32))
    wide = torch.full((2, inputs.block_table.shape[1] + 3), -7, device=device, dtype=torch.int32)
    wide[:, :-3] = inputs.block_table
    assert_right(inputs._replace(query=query, block_table=wide[:, :-3]), backend)
    swapped = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert_right(inputs._replace(query=swapped), backend)


def test_opcheck(backend: str, device: torch.device) -> None:
    for batch in (2, 0):
        inputs = made([3, 20][:batch], device=device, dtype=torch.bfloat16)
        # opcheck compares its own copies of the arguments, where a NaN differs from itself.
        keys, values = (pages.nan_to_num() for pages in (inputs.key_pages, inputs.value_pages))
        arguments = (*inputs._replace(key_pages=keys, value_pages=values), inputs.query, backend)
        torch.library.opcheck(torch.ops.custom_kernels.paged_attention, arguments)


def test_a_wrong_argument_is_one_clear_error() -> None:
    inputs = made([3, 20], heads=4, kv_heads=2, size=8)

    def bad(error: type[Exception], message: str, **changed: Any) -> None:
        with pytest.raises(error, match=f"paged_attention: {message}") as caught:
            custom_paged_attention(*inputs._replace(**changed))
        assert "\n" not in str(caught.value)

    query, keys = inputs.query, inputs.key_pages
    bad(ValueError, r"query must be \[B, Hq, D\] with .* got \[2, 32\]", query=query.flatten(1))
    bad(TypeError, "query must be bfloat16, float16 or float32", query=query.double())
    bad(TypeError, "key_pages must be torch.float32 like query", key_pages=keys.half())
    bad(ValueError, r"key_pages must be \[P, page, Hkv, 8\]", key_pages=keys[..., :4])
    bad(ValueError, "key_pages must be .* a divisor of 3", query=query[:, :3])
    bad(ValueError, "value_pages must be .* for keys and values", value_pages=inputs[2][:, :, :1])
    bad(ValueError, "key_pages must have unit inner stride", key_pages=keys.mT.contiguous().mT)
    table, lengths = inputs.block_table, inputs.lengths
    bad(ValueError, r"block_table must be \[2, W\] int32", block_table=table.long())
    bad(ValueError, r"block_table must be \[2, W\] int32", block_table=table[:1])
    bad(ValueError, r"lengths must be \[2\] int32", lengths=lengths[:, None])
    bad(ValueError, "lengths must be on cpu like query", lengths=lengths.to("meta"))


def test_calls_are_counted_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launches.ENVIRONMENT, str(tmp_path))
    launches.reset()
    key = torch.ones(1)
    launches.layer("model.attn", key.data_ptr())
    custom_paged_attention(*made([4]), layer=key)
    custom_paged_attention(*made([4]))
    (by_layer,) = launches.read_layers(tmp_path).values()
    assert by_layer == {"model.attn": {"paged_attention.reference": 1}}
    assert launches.counts() == {"paged_attention.reference": 2}
    launches.reset()


def test_a_case_counts_the_bytes_that_move() -> None:
    made_case = cases.case({}, 4, 8, 2, 64, "bfloat16", 1000)
    cache, rows, table = 4 * 1000 * 2 * 64 * 2 * 2, 2 * 4 * 8 * 64 * 2, 4 * (63 + 1) * 4
    assert made_case.bytes == cache + rows + table


# --- on a GPU -------------------------------------------------------------------------------------

GPU_BACKENDS = pytest.mark.parametrize(
    "backend", [name for name in OPERATION.backend_names() if name != "reference"]
)


@pytest.mark.gpu
@GPU_BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_models_shapes(gpu: torch.device, backend: str, batch: int, dtype: torch.dtype) -> None:
    lengths = [1 + 997 * (one + 1) % 3000 for one in range(batch)]
    for heads, kv_heads, size in [(14, 2, 64), (28, 4, 128), (32, 8, 64), (4, 4, 256)]:
        inputs = made(lengths, heads, kv_heads, size, 16, dtype, gpu, heads_first=False)
        assert_right(inputs, backend)


@pytest.mark.gpu
@GPU_BACKENDS
def test_capture_and_replay_for_other_lengths_and_pages(gpu: torch.device, backend: str) -> None:
    inputs = made([900, 900, 900], dtype=torch.bfloat16, device=gpu)
    custom_paged_attention(*inputs, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = custom_paged_attention(*inputs, backend=backend)
    for lengths in ([900, 1, 0], [0, 0, 899], [17, 16, 15]):
        inputs.lengths.copy_(torch.tensor(lengths))
        inputs.query.normal_()
        inputs.block_table.copy_(inputs.block_table.flip(0))
        poison(out)
        graph.replay()
        torch.cuda.synchronize()
        assert unwritten(out) == 0
        assert torch.equal(out, assert_right(inputs, backend))


@pytest.mark.gpu
@GPU_BACKENDS
def test_more_elements_than_32_bits_can_count(gpu: torch.device, backend: str) -> None:
    page, kv_heads, size = 16, 8, 128
    count = 2**31 // (page * kv_heads * 2 * size) + 100
    cache = torch.zeros(count, page, kv_heads, 2 * size, dtype=torch.bfloat16, device=gpu)
    cache[-3:].normal_()
    keys, values = cache.split(size, -1)
    query = torch.randn(1, 16, size, device=gpu).bfloat16()
    table = torch.tensor([[count - 2, count - 1, count - 3]], dtype=torch.int32, device=gpu)
    lengths = torch.tensor([40], dtype=torch.int32, device=gpu)
    assert_right(Inputs(query, keys, values, table, lengths, size**-0.5), backend)
