# SPDX-License-Identifier: Apache-2.0
"""custom_sparse_gemm: packing is exact, every backend is right, and what does not fit is refused in
one line."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from custom_kernels import launches, registry, sparsity
from custom_kernels.buckets import buckets
from custom_kernels.check.check import check
from custom_kernels.quant_expand import custom_quant_expand
from custom_kernels.quantization import QMAX, quantize
from custom_kernels.sparse_gemm import (
    DTYPES,
    OPERATION,
    SCALED,
    SparseWeight,
    _packing,
    cusparselt,
    custom_sparse_gemm,
    pack,
    prune_weight,
    quantize_weight,
    reference,
    sparse_linear,
    wgmma,
)
from custom_kernels.sparsity import expand
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

# |out - exact| <= rtol * |exact| + atol * (root mean square of exact). Half a unit in the last
# place of bfloat16 is 2^-8 at most; what is rounded twice, cuSPARSELt's 8-bit products, is first
# rounded before a bias is added, which may cancel it. atol covers cancellation in float32 sums.
ONCE = {"rtol": 2**-8, "atol": 1e-4}
TOLERANCES = {"cusparselt": {"rtol": 2**-7, "atol": 2**-6}}

PATTERNS = ("2:4", "4:6", "6:8", "8:10", "10:12", "30:32")
KINDS = [
    *((pattern, dtype) for pattern in PATTERNS for dtype in DTYPES),
    *(("mixed", dtype) for dtype in SCALED),
]
"""Every pattern with every dtype that it takes."""
SOME_KINDS = [kind for kind in KINDS if kind[0] in ("6:8", "mixed")]
BACKENDS = OPERATION.backend_names()


def make_weight(
    rows: int, k: int, pattern: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Small integers, which every dtype holds, with as many nonzeros as the pattern allows and
    some fewer."""
    kind = sparsity.pattern(pattern)
    shape = (rows, kind.groups(k), kind.group)
    weight = torch.randint(-4, 5, shape, device=device)
    places = torch.rand(shape, device=device).argsort(-1)[..., :2]
    pruned = weight.scatter(2, places, 0)
    if kind.mixed:  # of every 16 groups of 8 rows any 8
        order = torch.rand((-(-rows // 128), 16), device=device).argsort(-1)
        dense = (order < 8).flatten().repeat_interleave(8)[:rows]
        pruned = torch.where(dense[:, None, None], weight, pruned)
    return pruned.flatten(1)[:, :k].contiguous().to(dtype)


def skip_what_is_not_supported(backend: str, pattern: str) -> None:
    if pattern == "mixed" and backend == "cusparselt":
        pytest.skip("cuSPARSELt has no mixed weights")


def make_activation(
    rows: int, k: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    return torch.randint(-4, 5, (rows, k), device=device).to(dtype)


def make(
    m: int,
    n: int,
    k: int,
    pattern: str,
    dtype: torch.dtype,
    device: torch.device | str,
    backend: str,
    bias: bool = True,
) -> tuple[tuple[Any, ...], torch.Tensor]:
    """Arguments of custom_sparse_gemm, and the exact result of the dense product."""
    x = make_activation(m, k, dtype, device)
    weight = make_weight(n, k, pattern, dtype, device)
    scaled = dtype in SCALED
    a_scale = torch.rand(m, device=device) + 0.5 if scaled else None
    w_scale = torch.rand(n, device=device) + 0.5 if scaled else None
    b = torch.randn(n, device=device).bfloat16() if bias else None
    packed = pack(weight, pattern, w_scale, backend=backend)
    wanted = reference.dense(x, a_scale, weight, w_scale, b)
    return (expand(x, packed.pattern), a_scale, packed, b), wanted


def assert_right(out: torch.Tensor, wanted: torch.Tensor, backend: str) -> None:
    assert out.dtype == torch.bfloat16
    assert out.shape == wanted.shape
    assert out.is_contiguous()
    tolerance = TOLERANCES.get(backend, ONCE)
    size = float(wanted.norm()) / max(1, wanted.numel()) ** 0.5
    torch.testing.assert_close(
        out.double(), wanted, rtol=tolerance["rtol"], atol=tolerance["atol"] * size
    )


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that the folder holds."""
    return str(request.param)


# --- packing --------------------------------------------------------------------------------------


def decompress(values: torch.Tensor, metadata: torch.Tensor) -> torch.Tensor:
    """The inverse of ``compress``: [N, K'] from values [N, K'/2] and metadata [N, K'/8]."""
    rows, half = values.shape
    nibbles = torch.stack([metadata & 15, metadata >> 4], -1).flatten(1)
    places = torch.stack([nibbles & 3, nibbles >> 2], -1).long()  # [rows, K'/4, 2]
    bits = values.view(_packing.BITS[values.dtype.itemsize])
    out = bits.new_zeros((rows, half // 2, 4))
    out.scatter_(2, places, bits.unflatten(1, (half // 2, 2)))
    return out.flatten(1).view(values.dtype)


@st.composite
def sparse_rows(draw: st.DrawFn) -> tuple[str, torch.Tensor]:
    """A pattern and a weight of integers, its groups filled in any way that the pattern allows."""
    pattern = draw(st.sampled_from(PATTERNS))
    kind = sparsity.pattern(pattern)
    k = draw(st.integers(1, 3 * kind.group + 3))
    rows = draw(st.integers(1, 3))
    weight = torch.zeros(rows, kind.groups(k) * kind.group, dtype=torch.int64)
    for row in range(rows):
        for group in range(kind.groups(k)):
            inside = st.integers(0, kind.group - 1)
            for place in draw(st.sets(inside, max_size=kind.nonzeros)):
                weight[row, group * kind.group + place] = draw(st.integers(-9, 9))
    return pattern, weight[:, :k].contiguous()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=sparse_rows(), seed=st.integers(0, 2**16))
def test_expanded_times_packed_is_the_dense_product(
    drawn: tuple[str, torch.Tensor], seed: int
) -> None:
    pattern, weight = drawn
    kind = sparsity.pattern(pattern)
    torch.manual_seed(seed)
    x = torch.randint(-99, 100, (2, weight.shape[1]))
    windows = _packing.decompose(weight, kind)
    assert windows.shape[1] == kind.expanded(weight.shape[1])
    assert ((windows.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
    assert (windows != 0).sum() == (weight != 0).sum()
    small = windows.to(torch.int8)
    assert torch.equal(decompress(*_packing.compress(small)), small)
    assert torch.equal(expand(x, kind) @ windows.t(), x @ weight.t())


@pytest.mark.parametrize("pattern", ["2:4", "4:6", "6:8"])
def test_every_way_to_fill_a_group_is_decomposed(pattern: str) -> None:
    kind = sparsity.pattern(pattern)
    codes = torch.arange(2**kind.group)
    weight = (codes[:, None] >> torch.arange(kind.group) & 1) * torch.arange(1, kind.group + 1)
    weight = weight[(weight != 0).sum(1) <= kind.nonzeros]
    x = torch.randint(-99, 100, (3, kind.group))
    windows = _packing.decompose(weight, kind)
    assert ((windows.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
    assert torch.equal(expand(x, kind) @ windows.t(), x @ weight.t())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16])
def test_packing_keeps_every_bit_of_any_dtype(dtype: torch.dtype) -> None:
    weight = make_weight(5, 200, "6:8", dtype)
    if dtype.is_floating_point:
        weight = (weight.float() * 1.0625).to(dtype)  # not an integer
    kind = sparsity.pattern("6:8")
    windows = _packing.decompose(weight, kind)
    assert windows.dtype == dtype
    values, metadata = _packing.compress(windows)
    assert (values.dtype, metadata.dtype) == (dtype, torch.uint8)
    assert torch.equal(decompress(values, metadata).double(), windows.double())
    x = torch.eye(200, dtype=torch.float64)
    assert torch.equal(expand(x, kind) @ windows.double().t(), weight.double().t())


def test_large_weights_are_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make_weight(37, 96, "6:8", torch.int8)
    mixed = make_weight(300, 100, "mixed", torch.int8)
    whole = _packing.decompose(weight, sparsity.Pattern(4))
    compressed, order = _packing.compress(whole), _packing.halves(mixed)
    monkeypatch.setattr(_packing, "_CHUNK", {"cpu": 1000})
    threads = torch.get_num_threads()
    assert torch.equal(_packing.decompose(weight, sparsity.Pattern(4)), whole)
    for part, all_at_once in zip(_packing.compress(whole), compressed, strict=True):
        assert torch.equal(part, all_at_once)
    assert torch.equal(_packing.halves(mixed), order)
    assert torch.get_num_threads() == threads
    weight[29, 90] = weight[29, 88:96].fill_(1)[2]
    with pytest.raises(ValueError, match=r"row 29, group 11 \(columns 88 to 95\) has 8 nonzeros"):
        _packing.decompose(weight, sparsity.Pattern(4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_violates_the_pattern_is_refused(dtype: torch.dtype) -> None:
    weight = make_weight(6, 100, "6:8", dtype)
    weight[4, 8:15], weight[4, 15] = 1, 0
    weight[4, 16:24] = 1
    weight[5, 0:8] = 1
    scale = torch.ones(6) if dtype in SCALED else None
    with pytest.raises(
        ValueError,
        match=r"the weight is not 6:8: row 4, group 1 \(columns 8 to 15\) has 7 nonzeros, 6 are",
    ) as caught:
        pack(weight, "6:8", scale, backend="reference")
    assert "\n" not in str(caught.value)


def test_a_weight_with_too_many_dense_rows_is_refused() -> None:
    weight = make_weight(300, 100, "mixed", torch.int8)
    order = _packing.halves(weight)
    assert order.shape == (3, 16)
    assert order.sort(1).values.tolist() == [list(range(16))] * 3
    group = int(order[1, 3])  # one of the 2:4 ones
    row = 128 + 8 * group
    weight[row + 2, 40:44] = 1
    weight[row + 5, 0:4] = 1
    others = order[1, 8:].long()
    weight[128 + 8 * others, 0:4] = 1  # all eight are dense
    with pytest.raises(
        ValueError,
        match=r"the weight is not mixed: of rows 128 to 255, 9 groups of 8 rows are not 2:4, 8 "
        r"are allowed; the first too many has row \d+, group \d+ \(columns \d+ to \d+\)",
    ):
        pack(weight, "mixed", torch.ones(300), backend="reference")
    with pytest.raises(TypeError, match=r"a mixed weight must have 8 bits, got torch.bfloat16"):
        pack(weight.bfloat16(), "mixed")
    with pytest.raises(registry.BackendError, match=r"cusparselt does not support mixed weights"):
        pack(weight, "mixed", torch.ones(300), backend="cusparselt")


@pytest.mark.parametrize("rows", [64, 128, 200, 40, 9, 7])
def test_mixed_pruning_keeps_the_rows_dense_that_would_lose_most(rows: int) -> None:
    torch.manual_seed(rows)
    weight = torch.randn(rows, 64)
    pruned = prune_weight(weight, "mixed")
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])
    lost = (weight - prune_weight(weight, "2:4")).square().sum(1)
    for window in range(0, rows, 64):
        part = slice(window, window + 64)
        losses = [float(group.sum()) for group in lost[part].split(8)]
        dense = [bool((group != 0).all()) for group in pruned[part].split(8)]
        assert sum(dense) == len(losses) // 2
        kept = [loss for loss, whole in zip(losses, dense, strict=True) if whole]
        given = [loss for loss, whole in zip(losses, dense, strict=True) if not whole]
        assert not kept or min(kept) >= max(given)
    quantized, scale = quantize_weight(pruned, torch.int8)
    pack(quantized, "mixed", scale, backend="reference")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_a_negative_zero_is_a_zero(dtype: torch.dtype) -> None:
    kind = sparsity.pattern("2:4")
    weight = torch.tensor([[1.0, -0.0, 2.0, -0.0] * 16]).to(dtype)
    windows = _packing.decompose(weight, kind)
    assert not windows.float().signbit().any()
    assert weight.float().signbit().sum() == 32
    values, _ = _packing.compress(windows)
    assert values.float().tolist() == [[1.0, 2.0] * 16]
    # Without any, nothing has to be changed, and loading a model copies nothing.
    assert _packing.decompose(windows, kind) is windows


@pytest.mark.parametrize("dtype", SCALED)
def test_quantizing_a_weight_keeps_its_zeros_and_is_the_activations_quantization(
    dtype: torch.dtype,
) -> None:
    weight = torch.randn(8, 64) * make_weight(8, 64, "6:8", torch.int8).bool()
    q, scale = quantize_weight(weight, dtype)
    assert ((q.float() != 0) <= (weight != 0)).all()
    right, right_scale = quantize(weight, dtype)
    assert torch.equal(q.view(torch.uint8), right.view(torch.uint8))
    assert torch.equal(scale, right_scale)
    pack(q, "6:8", scale, backend="reference")


@pytest.mark.parametrize("dtype", SCALED)
def test_a_row_is_quantized_the_same_whatever_rows_are_beside_it(dtype: torch.dtype) -> None:
    most = QMAX[dtype]
    ordinary = torch.randn(3, 4)
    odd = torch.tensor([[0.0, -0.0, 0, 0], [1e-44, -1e-44, 0, -0.0], [1, torch.inf, -2, torch.nan]])
    alone, scale = quantize(ordinary, dtype)
    both, scales = quantize(torch.cat([ordinary, odd]), dtype)
    assert torch.equal(both[:3].view(torch.uint8), alone.view(torch.uint8))
    assert torch.equal(scales[:3], scale)
    expected = torch.tensor([[0.0] * 4, [most, -most, 0, 0], [0.0] * 4]).to(dtype)
    assert torch.equal(both[3:].view(torch.uint8), expected.view(torch.uint8))
    assert scales[3] == 0
    assert scales[5].isnan()


# --- every backend --------------------------------------------------------------------------------

SIZES = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 200, 257]))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    m=st.one_of(st.sampled_from([0, 1, 2]), SIZES),
    n=SIZES,
    k=SIZES,
    bias=st.booleans(),
    kind=st.sampled_from(KINDS),
)
@example(m=0, n=8, k=8, bias=True, kind=("6:8", torch.int8))
@example(m=1, n=1, k=1, bias=True, kind=("4:6", torch.float8_e4m3fn))
@example(m=33, n=1001, k=1003, bias=False, kind=("8:10", torch.bfloat16))
@example(m=300, n=512, k=640, bias=True, kind=("2:4", torch.float8_e4m3fn))
@example(m=1, n=1, k=1, bias=True, kind=("mixed", torch.int8))
@example(m=17, n=261, k=203, bias=False, kind=("mixed", torch.float8_e4m3fn))
def test_matches_exact_at_any_shape(
    backend: str,
    device: torch.device,
    m: int,
    n: int,
    k: int,
    bias: bool,
    kind: tuple[str, torch.dtype],
) -> None:
    pattern, dtype = kind
    if pattern == "mixed" and backend == "cusparselt":
        return
    torch.manual_seed(m * 7919 + n * 104729 + k)
    arguments, wanted = make(m, n, k, pattern, dtype, device, backend, bias)
    assert_right(custom_sparse_gemm(*arguments), wanted, backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_the_operations_own_checks(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    failures = [str(one) for one in check(OPERATION.backend(backend), device, name) if one.failure]
    assert not failures


@pytest.mark.parametrize(("pattern", "dtype"), KINDS)
def test_a_layer_is_close_to_the_layer_it_was_made_from(
    backend: str, device: torch.device, pattern: str, dtype: torch.dtype
) -> None:
    skip_what_is_not_supported(backend, pattern)
    n, k = 96, 320
    weight = torch.randn(n, k, device=device) / math.sqrt(k)
    weight *= make_weight(n, k, pattern, torch.int8, device).bool()
    q, scale = (weight.bfloat16(), None) if dtype not in SCALED else quantize_weight(weight, dtype)
    packed = pack(q, pattern, scale, backend=backend)
    x = torch.randn(2, 3, k, device=device).bfloat16()
    bias = torch.randn(n, device=device).bfloat16()
    out = sparse_linear(x, packed, bias)
    wanted = x.double() @ weight.double().t() + bias.double()
    assert out.shape == (2, 3, n)
    allowed = {torch.float8_e4m3fn: 5e-2, torch.int8: 2e-2, torch.bfloat16: 6e-3}[dtype]
    assert float((out.double() - wanted).norm() / wanted.norm()) < allowed


def test_leading_dimensions_are_kept(backend: str, device: torch.device) -> None:
    (a, scale, weight, bias), _ = make(30, 24, 40, "6:8", torch.int8, device, backend)
    flat = custom_sparse_gemm(a, scale, weight, bias)
    for shape in [(2, 15), (2, 3, 5), (30,), (1, 30)]:
        out = custom_sparse_gemm(a.view(*shape, -1), scale.view(shape), weight, bias)
        assert torch.equal(out, flat.view(*shape, 24))
    one = custom_sparse_gemm(a[0], scale[0], weight, bias)
    assert one.shape == (24,)
    empty = custom_sparse_gemm(a[:0].view(0, 3, a.shape[1]), scale[:0].view(0, 3), weight, bias)
    assert empty.shape == (0, 3, 24)


def test_a_row_whose_scale_is_nan_is_nan_and_a_row_of_zeros_is_the_bias(
    backend: str, device: torch.device
) -> None:
    for dtype in SCALED:
        (a, scale, weight, bias), wanted = make(5, 40, 96, "6:8", dtype, device, backend)
        scale[1] = torch.nan
        scale[3] = 0
        out = custom_sparse_gemm(a, scale, weight, bias)
        assert out[1].isnan().all()
        assert torch.equal(out[3], bias)
        assert_right(out[[0, 2, 4]].contiguous(), wanted[[0, 2, 4]], backend)


def test_activation_and_bias_of_any_layout(backend: str, device: torch.device) -> None:
    (a, scale, weight, bias), wanted = make(6, 24, 40, "4:6", torch.int8, device, backend)
    strided = torch.stack([a, a], 1)[:, 0]
    scales, biases = torch.stack([scale, scale], 1)[:, 0], torch.stack([bias, bias], 1)[:, 0]
    assert not strided.is_contiguous()
    assert_right(custom_sparse_gemm(strided, scales, weight, biases), wanted, backend)
    assert_right(custom_sparse_gemm(a.t().contiguous().t(), scale, weight, bias), wanted, backend)


# --- the operation --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (0,)])
def test_opcheck(
    backend: str, device: torch.device, bias: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    rows = math.prod(shape)
    (a, scale, weight, b), _ = make(rows, 24, 40, "6:8", dtype, device, backend, bias)
    a, scale = a.view(*shape, a.shape[1]), None if scale is None else scale.view(shape)
    arguments = (a, scale, weight.values, weight.metadata, weight.scale, b, 24, backend)
    torch.library.opcheck(torch.ops.custom_kernels.sparse_gemm, arguments)


def test_compiles_to_one_op_without_a_graph_break(backend: str, device: torch.device) -> None:
    (a, scale, weight, bias), _ = make(6, 24, 40, "6:8", torch.int8, device, backend)
    targets: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(
        lambda a, scale: torch.relu(custom_sparse_gemm(a, scale, weight, bias)),
        backend=keep,
        fullgraph=True,
    )
    wanted = torch.relu(custom_sparse_gemm(a, scale, weight, bias))
    assert torch.equal(compiled(a, scale), wanted)
    assert sum("sparse_gemm" in target for target in targets) == 1


def test_a_call_is_counted_and_an_error_is_not() -> None:
    (a, scale, weight, bias), _ = make(3, 8, 16, "2:4", torch.int8, "cpu", "reference")
    launches.reset()
    custom_sparse_gemm(a, scale, weight, bias)
    with pytest.raises(ValueError, match=r"a_scale"):
        custom_sparse_gemm(a, scale[:2], weight, bias)
    assert launches.counts() == {"sparse_gemm.reference": 1}


def test_65536_tokens_in_one_batch_are_each_what_they_are_alone(
    backend: str, device: torch.device
) -> None:
    """With a GPU the output has more than 2³¹ values: offsets of 32 bits would overflow."""
    tokens, features, k = 65_536, 32_832 if device.type == "cuda" else 24, 20
    weight = make_weight(features, k, "2:4", torch.int8, device)
    packed = pack(weight, "2:4", torch.rand(features, device=device), backend=backend)
    x = make_activation(tokens, k, torch.int8, device)
    a, scale = expand(x, packed.pattern), torch.rand(tokens, device=device)
    out = custom_sparse_gemm(a, scale, packed)
    for part in (slice(0, 64), slice(tokens // 2, tokens // 2 + 64), slice(tokens - 64, tokens)):
        assert_right(
            out[part], reference.dense(x[part], scale[part], weight, packed.scale, None), backend
        )


@pytest.fixture
def arguments() -> dict[str, Any]:
    (a, scale, weight, bias), _ = make(3, 8, 16, "6:8", torch.int8, "cpu", "reference")
    return {"a": a, "a_scale": scale, "weight": weight, "bias": bias}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.zeros(3, 24, dtype=torch.int8)}, ValueError, r"expanded for 6:8, got \[3, 24"),
        ({"a": torch.zeros(3, 64)}, TypeError, r"a must be \[\.\.\., 64\] torch.int8"),
        ({"a_scale": None}, ValueError, r"torch.int8 needs a_scale"),
        ({"a_scale": torch.ones(3).double()}, TypeError, r"a_scale must be float32, got torch.fl"),
        ({"a_scale": torch.ones(4)}, ValueError, r"a_scale must be \[3\], one per row of a, got"),
        ({"bias": torch.ones(8)}, TypeError, r"bias must be bfloat16, got torch.float32"),
        ({"bias": torch.ones(7).bfloat16()}, ValueError, r"bias must be \[8\] on cpu, got \[7\]"),
        ({"backend": "wgmma"}, ValueError, r"packed for reference, not for wgmma: pack it"),
    ],
)
def test_arguments_that_do_not_fit_are_one_clear_error(
    arguments: dict[str, Any], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        custom_sparse_gemm(**{**arguments, **change})
    assert "\n" not in str(caught.value)


def test_devices_that_differ_are_one_clear_error(arguments: dict[str, Any]) -> None:
    weight = arguments["weight"].to("meta")
    with pytest.raises(ValueError, match=r"must be \[8\] on cpu|must be on one device"):
        custom_sparse_gemm(**{**arguments, "weight": weight})


@pytest.mark.parametrize(
    ("weight", "pattern", "scale", "error", "message"),
    [
        (torch.zeros(4), "2:4", None, ValueError, r"weight must be \[N, K\], got \[4\]"),
        (torch.zeros(4, 4), "2:4", None, TypeError, r"weight must be one of float8_e4m3fn, int8"),
        (torch.zeros(4, 4).char(), "2:4", None, ValueError, r"torch.int8 needs scale"),
        (torch.zeros(4, 4).bfloat16(), "2:4", torch.ones(4), ValueError, r"takes no scale"),
        (torch.zeros(4, 4).char(), "2:4", torch.ones(5), ValueError, r"scale must be \[4\] on cpu"),
        (torch.zeros(4, 4).char(), "3:4", torch.ones(4), ValueError, r"3:4 is not a pattern"),
    ],
)
def test_weights_that_do_not_fit_are_one_clear_error(
    weight: torch.Tensor,
    pattern: str,
    scale: torch.Tensor | None,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        pack(weight, pattern, scale, backend="reference")


def test_a_wrong_backend_is_one_clear_error() -> None:
    weight = torch.zeros(4, 4).char()
    with pytest.raises(registry.BackendError, match=r"no backend 'wgma'; there are: wgmma"):
        pack(weight, "2:4", torch.ones(4), backend="wgma")
    if not torch.cuda.is_available():
        assert pack(weight, "2:4", torch.ones(4)).backend == "reference"
    packed = replace(pack(weight, "2:4", torch.ones(4), backend="reference"), backend="wgmma")
    with pytest.raises(registry.BackendError, match=r"wgmma.* on cpu: it runs on CUDA devices"):
        custom_sparse_gemm(torch.zeros(2, 64).char(), torch.ones(2), packed)


# --- wgmma's storage and tiles, without a GPU -----------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_wgmma_blocks_hold_what_each_thread_and_instruction_reads(dtype: torch.dtype) -> None:
    """Byte by byte, as PTX has it, from what is stored back to the weight; padding is zeros."""
    kind = sparsity.pattern("6:8")
    expanded = _packing.decompose(make_weight(100, 200, "6:8", dtype), kind)
    stored, _ = wgmma.storage(expanded)
    size = dtype.itemsize
    blocks = stored.shape[:2]
    values = torch.zeros((*blocks, 64, 64), dtype=torch.uint8)
    metadata = torch.full((*blocks, 64, 16 // size), 255, dtype=torch.uint8)
    for row in range(64):
        for chunk in range(4):
            start = chunk * 1024 + row * 16
            values[:, :, row, 16 * chunk : 16 * chunk + 16] = stored[..., start : start + 16]
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        row = 16 * warp + lane // 4
        if size == 1:  # two registers: 32 columns of one row for each instruction
            for instruction in range(2):
                word = stored[..., 4096 + 8 * thread + 4 * instruction :][..., :4]
                start = 8 * instruction + 4 * (lane // 2 % 2)
                metadata[:, :, row + 8 * (lane % 2), start : start + 4] = word
        else:  # one register: threads 0 and 1 of four for one instruction, 2 and 3 for the other
            word = stored[..., 4096 + 4 * thread :][..., :4]
            start = 4 * (lane // 2 % 2) + 2 * (lane % 2)
            metadata[:, :, row, start : start + 2] = word[..., :2]
            metadata[:, :, row + 8, start : start + 2] = word[..., 2:]
    whole = values.permute(0, 2, 1, 3).reshape(64 * blocks[0], -1).view(dtype)
    dense = decompress(whole, metadata.permute(0, 2, 1, 3).reshape(64 * blocks[0], -1).contiguous())
    assert dense.shape == (128, {1: 512, 2: 384}[size])  # whole blocks, an even number of them
    assert torch.equal(dense[:100, : expanded.shape[1]].float(), expanded.float())
    assert not dense[100:].float().any()
    assert not dense[:, expanded.shape[1] :].float().any()


@pytest.mark.parametrize("dtype", SCALED)
def test_wgmma_mixed_blocks_hold_a_2_4_block_and_64_dense_rows(dtype: torch.dtype) -> None:
    weight = make_weight(200, 192, "mixed", dtype)
    stored, order = wgmma.mixed_storage(weight)
    assert stored.shape == (2, 2, 5120 + 8192)
    padded = torch.zeros((256, 256), dtype=torch.uint8)
    padded[:200, :192] = weight.view(torch.uint8)
    for block in range(2):
        rows = [128 * block + 8 * int(group) + i for group in order[block] for i in range(8)]
        sparse, _ = wgmma.storage(padded[rows[:64]].view(dtype))
        assert torch.equal(stored[block, :, :5120], sparse[0])
        for column in range(2):
            dense = stored[block, column, 5120:].view(8, 64, 16).transpose(0, 1).flatten(1)
            assert torch.equal(dense, padded[rows[64:], 128 * column : 128 * column + 128])


@pytest.mark.nvcc
def test_wgmma_tiles_are_those_that_python_numbers() -> None:
    library = OPERATION.backend("wgmma").library()
    for mixed, tiles in enumerate((wgmma.TILES, wgmma.MIXED_TILES)):
        numbered = [tuple(tile) for tile in library.tiles(bool(mixed))]
        assert numbered == [tuple(tile[:4]) for tile in tiles]


@pytest.mark.parametrize(
    ("m", "n", "k", "tokens", "split", "shared"),
    [
        (1, 4608, 3584, 16, 1, False),
        (1, 37888, 3584, 16, 1, False),
        (16, 3584, 3584, 16, 2, False),
        (16, 3584, 18944, 16, 2, False),
        (64, 4608, 3584, 32, 1, False),
        (64, 37888, 3584, 64, 1, False),
        (256, 3584, 18944, 128, 2, False),
        (1024, 3584, 3584, 256, 1, False),
        (2048, 4608, 3584, 192, 1, False),
        (4096, 3584, 18944, 256, 4, True),
        (16384, 37888, 3584, 256, 1, False),
    ],
)
def test_wgmma_chooses_what_was_fastest_on_an_h200(
    m: int, n: int, k: int, tokens: int, split: int, shared: bool
) -> None:
    for dtype in SCALED:
        choice = wgmma.choose(dtype, m, n, k, 132)
        tile = wgmma.TILES[choice.tile]
        assert (tile.tokens, choice.split, tile.shared) == (tokens, split, shared)


@pytest.mark.parametrize(
    ("m", "n", "k", "tokens", "split", "shared"),
    [
        (1, 37888, 3584, 16, 1, False),
        (16, 3584, 18944, 16, 2, False),
        (32, 4608, 3584, 32, 1, False),
        (64, 3584, 18944, 64, 4, False),
        (128, 37888, 3584, 128, 1, False),
        (1024, 4608, 3584, 192, 1, False),
        (4096, 3584, 18944, 256, 4, True),
        (16384, 4608, 3584, 256, 4, True),
    ],
)
def test_wgmma_chooses_for_mixed_weights_what_was_fastest_on_an_h200(
    m: int, n: int, k: int, tokens: int, split: int, shared: bool
) -> None:
    choice = wgmma.choose(torch.float8_e4m3fn, m, n, k, 132, mixed=True)
    tile = wgmma.MIXED_TILES[choice.tile]
    assert (tile.tokens, choice.split, tile.shared) == (tokens, split, shared)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "mixed"])
def test_any_number_of_tokens_is_right_where_blocks_compute_many_tiles(
    gpu: torch.device, pattern: str
) -> None:
    for m in [63, 70, 130, 190, 255, 257, 300, 450, 700, 1025, 1090, 2100, 4160]:
        arguments, wanted = make(m, 37888, 256, pattern, torch.float8_e4m3fn, gpu, "wgmma")
        assert_right(custom_sparse_gemm(*arguments), wanted, "wgmma")


def test_cusparselt_packs_on_a_gpu_only() -> None:
    with pytest.raises(ValueError, match=r"compresses weights on the GPU, this one is on cpu"):
        pack(torch.zeros(4, 4).char(), "2:4", torch.ones(4), backend="cusparselt")


def test_cusparselt_pads_rows_only_where_it_must() -> None:
    matrix = torch.ones(32, 4)
    assert cusparselt.pad_rows(matrix, 16) is matrix
    padded = cusparselt.pad_rows(matrix[:17], 16)
    assert padded.shape == (32, 4)
    assert padded.sum() == 17 * 4


# --- on a GPU -------------------------------------------------------------------------------------


FAST = pytest.mark.parametrize("fast", [name for name in BACKENDS if name != "reference"])


@pytest.mark.gpu
@FAST
@pytest.mark.parametrize(("pattern", "dtype"), KINDS)
@pytest.mark.parametrize("m", [1, 17, 63, 200, 257, 1024])
def test_exact_on_integers(
    gpu: torch.device, fast: str, dtype: torch.dtype, pattern: str, m: int
) -> None:
    """Without scales every sum is a small integer, which bfloat16 holds up to 256 exactly."""
    skip_what_is_not_supported(fast, pattern)
    weight = make_weight(328, 328, pattern, dtype, gpu).to(torch.float32).sign().to(dtype)
    x = make_activation(m, 328, dtype, gpu).to(torch.float32).sign().to(dtype)
    ones = [torch.ones(size, device=gpu) if dtype in SCALED else None for size in (m, 328)]
    packed = pack(weight, pattern, ones[1], backend=fast)
    out = custom_sparse_gemm(expand(x, packed.pattern), ones[0], packed)
    assert torch.equal(out.double(), x.double() @ weight.double().t())


@pytest.mark.gpu
@pytest.mark.parametrize(("pattern", "dtype"), SOME_KINDS)
def test_every_tile_of_wgmma_is_right(
    gpu: torch.device, pattern: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fourth has a wave that is not full, of few tiles: they are shared out. The last is nothing
    # but storing: many tiles in a block, and in a tile tokens that are not there.
    shapes = [
        (1, 128, 128),
        (300, 1000, 640),
        (1000, 3584, 3584),
        (1024, 4608, 1024),
        (70, 70_000, 128),
    ]
    for m, n, k in shapes:
        arguments, wanted = make(m, n, k, pattern, dtype, gpu, "wgmma")
        tiles = wgmma.MIXED_TILES if pattern == "mixed" else wgmma.TILES
        for index, tile in enumerate(tiles):
            for split in tile.splits:
                for pair in (1, 2):
                    choice = wgmma.Choice(index, pair, split)
                    monkeypatch.setattr(wgmma, "choose", lambda *_, choice=choice: choice)
                    assert_right(custom_sparse_gemm(*arguments), wanted, "wgmma")


@pytest.mark.gpu
@FAST
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(24, 1160), (1000, 3584)])
def test_capture_and_replay(
    gpu: torch.device, fast: str, dtype: torch.dtype, m: int, n: int
) -> None:
    (a, scale, weight, bias), _ = make(m, n, 904, "6:8", dtype, gpu, fast)
    custom_sparse_gemm(a, scale, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = custom_sparse_gemm(a, scale, weight, bias)
    for seed in range(3):
        torch.manual_seed(seed)
        a.copy_(make_activation(m, a.shape[1], dtype, gpu))
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        eager = custom_sparse_gemm(a, scale, weight, bias)
        assert torch.equal(out, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "mixed"])
@pytest.mark.parametrize("m", [1, 16, 64, 1000])
def test_wgmma_waits_for_what_quant_expand_writes(gpu: torch.device, m: int, pattern: str) -> None:
    """Its blocks start while quant_expand runs: one after the other with waits between them must
    give the same, in a graph and without."""
    weight = make_weight(3584, 18944, pattern, torch.float8_e4m3fn, gpu)
    packed = pack(weight, pattern, torch.ones(3584, device=gpu), backend="wgmma")
    inputs = [torch.randn(m, 18944, device=gpu, dtype=torch.bfloat16) for _ in range(20)]
    apart = []
    for x in inputs:
        q, scale = custom_quant_expand(x, "2:4", torch.float8_e4m3fn)
        torch.cuda.synchronize()
        apart.append(custom_sparse_gemm(q, scale, packed))
        torch.cuda.synchronize()
    together = [sparse_linear(x, packed) for x in inputs]
    assert all(map(torch.equal, together, apart))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [sparse_linear(x, packed) for x in inputs]
    for out in outputs:
        out.fill_(math.nan)
    graph.replay()
    assert all(map(torch.equal, outputs, apart))


@pytest.mark.gpu
def test_cusparselt_does_not_search_during_a_capture(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    (a, scale, weight, bias), wanted = make(48, 1184, 640, "2:4", torch.int8, gpu, "cusparselt")
    custom_sparse_gemm(a[:16], scale[:16], weight, bias)  # loads the library, plans another bucket
    searched = dict(cusparselt._settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = custom_sparse_gemm(a, scale, weight, bias)
    graph.replay()
    assert cusparselt._settings == searched
    assert_right(out, wanted, "cusparselt")
    assert [*buckets(48)][-1] == 48


@pytest.mark.gpu
@FAST
@pytest.mark.parametrize(("pattern", "dtype"), SOME_KINDS)
def test_the_same_bits_every_time(
    gpu: torch.device, fast: str, pattern: str, dtype: torch.dtype
) -> None:
    skip_what_is_not_supported(fast, pattern)
    arguments, _ = make(1000, 3584, 3584, pattern, dtype, gpu, fast)
    first = custom_sparse_gemm(*arguments)
    assert all(torch.equal(custom_sparse_gemm(*arguments), first) for _ in range(5))


@pytest.mark.gpu
@FAST
@pytest.mark.parametrize("pattern", ["2:4", "mixed"])
def test_more_elements_than_32_bits_can_count(gpu: torch.device, fast: str, pattern: str) -> None:
    skip_what_is_not_supported(fast, pattern)
    m, n, k = 70_000, 32_768, 64
    (a, scale, weight, bias), _ = make(m, n, k, pattern, torch.int8, gpu, fast)
    out = custom_sparse_gemm(a, scale, weight, bias)
    assert m * n > 2**31
    plain = pack_again(weight, fast, n, k, gpu)
    for rows in (slice(0, 4), slice(65_530, 65_542), slice(m - 4, m)):
        part = custom_sparse_gemm(a[rows], scale[rows], plain, bias)
        # Both are rounded to bfloat16, one of them perhaps twice: two units in the last place.
        torch.testing.assert_close(out[rows].double(), part.double(), rtol=2**-6, atol=2**-6)


def pack_again(weight: SparseWeight, fast: str, n: int, k: int, gpu: torch.device) -> SparseWeight:
    """The weight for the reference: recovered by multiplying with the identity."""
    one = torch.ones(weight.expanded, device=gpu)
    unit = replace(weight, scale=torch.ones(n, device=gpu))
    eye = torch.eye(weight.expanded, device=gpu, dtype=torch.int8)
    dense = custom_sparse_gemm(eye, one, unit).t()[:, :k].to(torch.int8).contiguous()
    return pack(dense, str(weight.pattern), weight.scale, backend="reference")
