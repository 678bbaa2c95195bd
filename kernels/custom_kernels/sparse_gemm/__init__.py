# SPDX-License-Identifier: Apache-2.0
"""sparse_gemm: y = dequant(A · Wᵀ) + b with a (2N-2):2N sparse weight on 2:4 tensor cores.

A is the expanded activation from ``custom_quant_expand``, W the weight packed by ``pack`` for the
same pattern. This file is the operation: its public functions, its argument checks (only here), and
its registration as ``torch.ops.custom_kernels.sparse_gemm``.
"""

import math
from dataclasses import dataclass, replace
from importlib import import_module

import torch

from custom_kernels import launches, quantization, registry, sparsity
from custom_kernels.quant_expand import custom_quant_expand
from custom_kernels.sparse_gemm import _packing
from custom_kernels.sparse_gemm._packing import Arguments

OPERATION = registry.operation("sparse_gemm")

BACKEND_PRIORITY = {"cuda": ("wgmma", "cusparselt", "reference"), "cpu": ("reference",)}
"""Backends per device type, best first."""

USES_TENSOR_CORES = True
"""`make inspect` warns of kernels without tensor-core instructions."""

SCALED = (torch.float8_e4m3fn, torch.int8)
"""Dtypes of A and W that come with scales; bfloat16 comes without."""
DTYPES = (*SCALED, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A weight [N, K] of a (2N-2):2N pattern, packed for one backend. ``pack`` makes it."""

    backend: str
    pattern: sparsity.Pattern
    features: int
    """N."""
    k: int
    dtype: torch.dtype
    values: torch.Tensor
    """The kept values, in the backend's layout."""
    metadata: torch.Tensor
    """Their positions, in the backend's layout; empty if they are stored with the values."""
    scale: torch.Tensor | None
    """[N] float32, for 8-bit dtypes."""

    @property
    def expanded(self) -> int:
        """K', the length of the activation's rows."""
        return self.pattern.expanded(self.k)

    def to(self, device: torch.device | str) -> "SparseWeight":
        """The same on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        moved = {"values": self.values.to(device), "metadata": self.metadata.to(device)}
        return replace(self, scale=scale, **moved)


def pack(
    weight: torch.Tensor,
    pattern: str,
    scale: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> SparseWeight:
    """Pack a weight that has the zeros of a (2N-2):2N pattern; once, when the weights are loaded.

    The nonzeros are distributed over the windows of the expansion, so that each window is 2:4, and
    compressed. Nothing is rounded: ``expand(x) · pack(weight)ᵀ`` is ``x · weightᵀ``, term by term.
    For ``reference`` the result may share the weight's memory.

    Args:
        weight: [N, K], int8, float8_e4m3fn or bfloat16, already quantized (see
            ``quantize_weight``).
        pattern: ``"2:4"``, ``"4:6"``, ``"6:8"``, ``"8:10"``, ... up to ``"30:32"``; or ``"mixed"``
            (see ``sparsity``), for the 8-bit dtypes. K need not be a multiple of the group.
        scale: [N] float32, of each output channel; for the 8-bit dtypes, and only for those.
        backend: a name from ``OPERATION.backends`` that the weight is packed for; None: the best
            for its device and dtype.

    Raises:
        TypeError: another dtype.
        ValueError: a shape does not fit, or the weight violates the pattern; the message names the
            first row and group.
        registry.BackendError: the backend does not exist or does not support dtype or pattern.
    """
    if weight.dim() != 2:
        raise ValueError(f"sparse_gemm: weight must be [N, K], got {list(weight.shape)}")
    if weight.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"sparse_gemm: weight must be one of {names}, got {weight.dtype}")
    _check_scale("scale", scale, weight.shape[0], weight.dtype, weight.device)
    kind = sparsity.pattern(pattern)
    if kind.mixed and weight.dtype not in SCALED:
        raise TypeError(f"sparse_gemm: a mixed weight must have 8 bits, got {weight.dtype}")
    backend = backend or _best(kind, weight.device, weight.dtype)
    if backend not in OPERATION.backend_names():
        known = ", ".join(one.name for one in OPERATION.backends)
        raise registry.BackendError(f"sparse_gemm has no backend {backend!r}; there are: {known}")
    if not OPERATION.backend(backend).supports_dtype(weight.dtype):
        raise registry.BackendError(f"sparse_gemm.{backend} does not support {weight.dtype}")
    n, k = weight.shape
    weight = weight.detach().contiguous()
    module = import_module(f"{__name__}.{backend}")
    if kind.mixed:
        if not hasattr(module, "mixed_storage"):
            raise registry.BackendError(f"sparse_gemm.{backend} does not support mixed weights")
        values, metadata = module.mixed_storage(_packing.pad_bits(weight, kind.expanded(k) - k))
    else:
        values, metadata = module.storage(_packing.decompose(weight, kind))
    scale = None if scale is None else scale.contiguous()
    return SparseWeight(backend, kind, n, k, weight.dtype, values, metadata, scale)


def _best(kind: sparsity.Pattern, device: torch.device, dtype: torch.dtype) -> str:
    """The first backend by priority that can run there and takes the pattern."""
    best = OPERATION.best(device, dtype)
    if kind.mixed and not hasattr(best.module, "mixed_storage"):
        return "reference"
    return best.name


def prune_weight(
    weight: torch.Tensor, pattern: str, norms: torch.Tensor | None = None
) -> torch.Tensor:
    """Set the two least important of every 2N consecutive weights of a row to zero.

    The importance of W[n, k] is |W[n, k]| · norms[k]. Of equal ones the first are kept. A last
    group that is not full counts as filled up with zeros. For ``"mixed"`` this is done, as for
    2:4, in half of the groups of 8 rows in every 64: in those that lose least, by the sum of the
    squared importances (64, so that parts of a layer may be split or joined at multiples of 64).

    Args:
        weight: [N, K] of any dtype.
        pattern: as for ``pack``.
        norms: [K], the L2 norm of each input feature over many tokens (Wanda, arXiv 2306.11695);
            None: all 1, so that magnitude decides.

    Returns:
        A new tensor [N, K].
    """
    kind = sparsity.pattern(pattern)
    weight = weight.detach().contiguous()
    bits = weight.view(_packing.BITS[weight.dtype.itemsize])
    # As integers, positive floats have the same order, and a NaN is above all.
    if norms is None and weight.dtype in (torch.bfloat16, torch.float16):
        order = bits & 0x7FFF
    else:
        importance = weight.float().abs()
        order = (importance if norms is None else importance * norms).view(torch.int32)
    kept = _kept(order, kind)
    if kind.mixed:
        importance = weight.float() if norms is None else weight.float() * norms
        lost = (importance.view(torch.int32) & ~kept).view(torch.float32)
        kept |= _dense_rows(lost.square_().sum(1)).to(kept.dtype).neg_()[:, None]
    return (bits & kept.to(bits.dtype)).view(weight.dtype)


def _kept(order: torch.Tensor, kind: sparsity.Pattern) -> torch.Tensor:
    """-1 for each of order [N, K] that is one of the largest of its group, 0 for the others.

    order: integers that are not negative, so that none of their differences overflows. On a CPU the
    sign of a difference, shifted, takes a fraction of the time of a comparison; and the whole
    matrix is compared with itself, moved by a few places, because taking the values of each group
    apart costs as much as all else.
    """
    k = order.shape[1]
    if k % kind.group:
        order = torch.nn.functional.pad(order, (0, -k % kind.group))
    place = torch.arange(order.shape[1], device=order.device) % kind.group
    # How many of its group are better than each, less those kept; at first all that come before it.
    rank = (place - kind.nonzeros).to(order.dtype).repeat(len(order), 1)
    less = torch.empty_like(order)
    values, before, after = order.view(-1), less.view(-1), rank.view(-1)
    sign = order.dtype.itemsize * 8 - 1
    for distance in range(1, kind.group):
        torch.sub(values[:-distance], values[distance:], out=before[:-distance])
        less >>= sign  # -1 where the later one is better
        less &= (place < kind.group - distance).to(order.dtype).neg_()  # and of the same group
        after[:-distance].sub_(before[:-distance])
        after[distance:].add_(before[:-distance])
    rank >>= sign
    return rank[:, :k]


def _dense_rows(losses: torch.Tensor) -> torch.Tensor:
    """Which rows [N] stay dense, by what pruning each would lose."""
    n, window = len(losses), sparsity.MIXED_ROWS // 2
    rows = torch.nn.functional.pad(losses, (0, -n % window))
    groups = rows.view(-1, window // sparsity.MIXED_GROUP, sparsity.MIXED_GROUP).sum(-1)
    place = groups.argsort(dim=1, descending=True, stable=True).argsort(1)  # 0 is what loses most
    # Of the last window, which may be smaller, half of what is there.
    there = -(-n // sparsity.MIXED_GROUP) - window // sparsity.MIXED_GROUP * (len(groups) - 1)
    most = torch.full((len(groups), 1), groups.shape[1] // 2, device=losses.device)
    most[-1] = there // 2
    return (place < most).repeat_interleave(sparsity.MIXED_GROUP)[:n]


def quantize_weight(
    weight: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each output channel symmetrically, exactly as ``custom_quant_expand`` does a token.

    Zeros stay zeros, so a pattern is kept. weight [N, K] floating point; returns [N, K] of
    ``dtype`` (int8 or float8_e4m3fn) and scale [N] float32.
    """
    return quantization.quantize(weight.detach(), dtype)


def custom_sparse_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    weight: SparseWeight,
    bias: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``y[..., n] = (sum_k a[..., k] * W[n, k]) * a_scale[...] * w_scale[n] + bias[n]``.

    The sum is exact in int32 for int8, in the tensor cores' float32 for the others. For inference:
    there is no gradient. A row whose scale is NaN gives NaN.

    Args:
        a: [..., K'], the dtype of ``weight``, expanded for its pattern (``custom_quant_expand``).
        a_scale: [...] float32, of each row of a; None for bfloat16.
        weight: from ``pack``, on a's device.
        bias: [N] bfloat16 or None.
        backend: None or the name of the backend for which the weight was packed.

    Returns:
        [..., N] bfloat16, contiguous. Without rows it is empty.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit, or the weight is packed for another backend.
        registry.BackendError: the backend cannot run here.
    """
    if backend is not None and backend != weight.backend:
        raise ValueError(
            f"sparse_gemm: the weight is packed for {weight.backend}, not for {backend}: "
            f"pack it with backend={backend!r}"
        )
    if a.shape[-1:] != (weight.expanded,) or a.dtype != weight.dtype:
        raise (TypeError if a.dtype != weight.dtype else ValueError)(
            f"sparse_gemm: a must be [..., {weight.expanded}] {weight.dtype}, expanded for "
            f"{weight.pattern}, got {list(a.shape)} {a.dtype}"
        )
    return _op(
        a,
        a_scale,
        weight.values,
        weight.metadata,
        weight.scale,
        bias,
        weight.features,
        weight.backend,
    )


def sparse_linear(
    x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``y = x · Wᵀ + bias``: x [..., K] bfloat16 is quantized, expanded and multiplied.

    Returns [..., N] bfloat16. bfloat16 weights take the expanded x as it is.
    """
    if weight.dtype == torch.bfloat16:
        # The expansion for 2:4 is the row itself, padded.
        same = weight.pattern.n == 2 and weight.k == weight.expanded
        a = x if same else sparsity.expand(x, weight.pattern)
        return custom_sparse_gemm(a, None, weight, bias)
    q, scale = custom_quant_expand(x, weight.pattern.expansion, weight.dtype)
    return custom_sparse_gemm(q, scale, weight, bias)


def empty_output(*arguments: *Arguments) -> torch.Tensor:
    """The output, not yet written: [..., N] bfloat16, contiguous. It is also what torch.compile
    traces with."""
    a, *_, features = arguments
    return a.new_empty((*a.shape[:-1], features), dtype=torch.bfloat16)


def _check_scale(
    name: str,
    scale: torch.Tensor | None,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if (scale is not None) != (dtype in SCALED):
        wanted = "needs" if dtype in SCALED else "takes no"
        raise ValueError(f"sparse_gemm: {dtype} {wanted} {name}")
    if scale is None:
        return
    if scale.dtype != torch.float32:
        raise TypeError(f"sparse_gemm: {name} must be float32, got {scale.dtype}")
    if list(scale.shape) != [length] or scale.device != device:
        raise ValueError(
            f"sparse_gemm: {name} must be [{length}] on {device}, got {list(scale.shape)} on "
            f"{scale.device}"
        )


def _check(*arguments: *Arguments) -> None:
    a, a_scale, values, metadata, w_scale, bias, features = arguments
    if a.dim() < 1 or a.dtype not in DTYPES:
        raise TypeError(
            f"sparse_gemm: a must be int8, float8_e4m3fn or bfloat16 with rows, got {a.dtype} "
            f"{list(a.shape)}"
        )
    # Not Size.numel(): under torch.compile it makes the number of rows a constant.
    rows = math.prod(a.shape[:-1])
    if a_scale is not None and a_scale.shape != a.shape[:-1]:
        raise ValueError(
            f"sparse_gemm: a_scale must be {list(a.shape[:-1])}, one per row of a, got "
            f"{list(a_scale.shape)}"
        )
    flat = None if a_scale is None else a_scale.reshape(-1)
    _check_scale("a_scale", flat, rows, a.dtype, a.device)
    _check_scale("the weight's scale", w_scale, features, a.dtype, a.device)
    if values.device != a.device or metadata.device != a.device:
        raise ValueError(
            f"sparse_gemm: a and weight must be on one device, got {a.device} and {values.device}"
        )
    if bias is None:
        return
    if bias.dtype != torch.bfloat16:
        raise TypeError(f"sparse_gemm: bias must be bfloat16, got {bias.dtype}")
    if list(bias.shape) != [features] or bias.device != a.device:
        raise ValueError(
            f"sparse_gemm: bias must be [{features}] on {a.device}, got {list(bias.shape)} on "
            f"{bias.device}"
        )


def _sparse_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    values: torch.Tensor,
    metadata: torch.Tensor,
    w_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    features: int,
    backend: str,
) -> torch.Tensor:
    arguments = (a, a_scale, values, metadata, w_scale, bias, features)
    _check(*arguments)
    run = OPERATION.runner(backend, a.device, a.dtype)
    if a.numel() == 0 or features == 0:
        out = empty_output(*arguments)
        return out.zero_() if bias is None else out.copy_(bias)
    rows = a.reshape(-1, a.shape[-1]).contiguous()
    scale = None if a_scale is None else a_scale.reshape(-1).contiguous()
    bias = None if bias is None else bias.contiguous()
    out = run(rows, scale, values, metadata, w_scale, bias, features)
    launches.record("sparse_gemm", backend, values.data_ptr(), tokens=rows.shape[0])
    return out if a.dim() == 2 else out.view(*a.shape[:-1], features)


_op = OPERATION.register(
    "(Tensor a, Tensor? a_scale, Tensor values, Tensor metadata, Tensor? w_scale, Tensor? bias, "
    "int features, str backend) -> Tensor",
    _sparse_gemm,
    _check,
)
