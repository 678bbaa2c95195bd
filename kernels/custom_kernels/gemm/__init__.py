# SPDX-License-Identifier: Apache-2.0
"""GEMM: y = x · Wᵀ + b, the unquantized linear layer.

This file is the operation: its public function, its argument checks (only here), and its
registration as ``torch.ops.custom_kernels.gemm``, so that it is one node under torch.compile and in
vLLM.
"""

import torch

from custom_kernels import launches, registry, tuned

OPERATION = registry.operation("gemm")

BACKEND_PRIORITY = {"cuda": ("cublaslt", "reference"), "cpu": ("reference",)}
"""Backends per device type, best first. Where a GPU's tuning file says that another was measured to
be faster than the first (95 % CI), that one goes first."""

USES_TENSOR_CORES = True
"""`make inspect` warns of kernels without tensor-core instructions."""


def custom_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Apply a linear layer: ``y[..., n] = sum_k x[..., k] * weight[n, k] + bias[n]``.

    Products are summed in float32, or in x's own precision if that is higher. For inference: there
    is no gradient.

    Args:
        x: [..., K], floating point, any row stride; without unit inner stride x is copied first.
        weight: [N, K], dtype and device of x, unit inner stride, any row stride.
        bias: [N], dtype and device of x, or None.
        backend: a name from ``OPERATION.backends``; None: the one measured to be best for this
            GPU, layer and number of rows (see ``tuned``), or without a measurement the first of
            BACKEND_PRIORITY that supports x's device and dtype.

    Returns:
        [..., N], contiguous, dtype and device of x. Without rows it is empty; without K it is the
        bias.

    Raises:
        TypeError: the dtypes differ, or are not floating point.
        ValueError: shapes, devices or the weight's layout do not fit.
        registry.BackendError: the backend does not exist, cannot run here, or does not support this
            dtype.
    """
    return _op(x, weight, bias, backend or "")


def on_engine_start() -> None:
    """Called when vLLM loads its plugins: the first, largest call of a layer then plans its smaller
    batches, too."""
    from custom_kernels.gemm import cublaslt

    cublaslt.plan_smaller_batches = True


def empty_output(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The output, not yet written: [..., N], contiguous. It is also what torch.compile traces
    with."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"gemm: x must be [..., K] and weight [N, K], "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(
            f"gemm: bias must be [{weight.shape[0]}], one per row of weight, got {list(bias.shape)}"
        )
    if (
        not x.is_floating_point()
        or weight.dtype != x.dtype
        or (bias is not None and bias.dtype != x.dtype)
    ):
        others = f"{weight.dtype}" + ("" if bias is None else f" and {bias.dtype}")
        raise TypeError(
            f"gemm: x, weight and bias must share one floating dtype, got {x.dtype}, {others}; "
            "convert once, when the weights are loaded"
        )
    if weight.device != x.device or (bias is not None and bias.device != x.device):
        others = f"{weight.device}" + ("" if bias is None else f" and {bias.device}")
        raise ValueError(
            f"gemm: x, weight and bias must be on one device, got {x.device}, {others}"
        )
    if not _has_unit_inner_stride(weight):
        raise ValueError(
            "gemm: weight must have unit inner stride and rows that do not overlap, "
            f"got strides {list(weight.stride())}; call .contiguous() once, when the weights "
            "are loaded"
        )


def _has_unit_inner_stride(matrix: torch.Tensor) -> bool:
    rows, columns = matrix.shape
    return (columns <= 1 or matrix.stride(1) == 1) and (rows <= 1 or matrix.stride(0) >= columns)


def _gemm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, backend: str
) -> torch.Tensor:
    _check(x, weight, bias)
    n, k = weight.shape
    chosen = not backend
    if chosen:
        m = x.numel() // k if k else 0
        backend = tuned.backend("gemm", x.device, x.dtype, m, N=n, K=k, bias=bias is not None)
    run = OPERATION.runner(backend, x.device, x.dtype)
    if x.numel() == 0 or n == 0:
        out = empty_output(x, weight, bias)
        return out.zero_() if bias is None else out.copy_(bias)
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    if not _has_unit_inner_stride(rows):
        rows = rows.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if chosen and backend != BACKEND_PRIORITY["cuda"][0] and x.device.type == "cuda":
        _plan_ahead(rows, weight, bias)
    out = run(rows, weight, bias)
    launches.record("gemm", backend, weight.data_ptr(), tokens=rows.shape[0])
    return out if x.dim() == 2 else out.view(*x.shape[:-1], n)


_planned: dict[tuple[object, ...], int] = {}


def _plan_ahead(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """In the engine, make cuBLASLt's plans for a layer also where tuning gives its first, largest
    call to another backend."""
    from custom_kernels.gemm import cublaslt

    if not cublaslt.plan_smaller_batches or rows.dtype not in cublaslt.DTYPES:
        return
    layer = (rows.device, rows.dtype, weight.shape, bias is not None)
    if rows.shape[0] > _planned.get(layer, 0) and not torch.cuda.is_current_stream_capturing():
        _planned[layer] = rows.shape[0]
        cublaslt.plan_ahead(rows, weight, bias)


_op = OPERATION.register(
    "(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor", _gemm, _check
)
