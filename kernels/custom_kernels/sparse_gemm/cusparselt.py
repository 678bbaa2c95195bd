# SPDX-License-Identifier: Apache-2.0
"""The host half of the cuSPARSELt backend: how shapes are padded, and when the library searches for
an algorithm.

With bfloat16 everything is fused. With int8 the weight's scale is; a second kernel applies the
activation's scale and the bias in place, so the result is rounded twice. With float8 the second
kernel applies all three.

The library requires N and M in multiples. N is padded when the weight is packed; an activation with
another M is copied into a padded one.
"""

import functools
import logging
import threading
from typing import Any

import torch
from torch.nn.functional import pad

from custom_kernels import registry
from custom_kernels.buckets import bucket
from custom_kernels.sparse_gemm import _packing

DTYPES = (torch.float8_e4m3fn, torch.int8, torch.bfloat16)

FEATURES_MULTIPLE = 32
TOKENS_MULTIPLE = 16

log = logging.getLogger(__name__)

_library = functools.cache(registry.operation("sparse_gemm").backend("cusparselt").library)

Product = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]
"""Arguments of the library's product: a, values, w_scale, bias and the output, all padded."""

_settings: dict[tuple[torch.device, torch.dtype, int, int, int, bool], list[int]] = {}
"""Results of searches, per layer shape and bucket of M."""
_searching = threading.Lock()


def storage(expanded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The expanded weight [N, K'], compressed by the library on the weight's GPU; no metadata."""
    if expanded.device.type != "cuda":
        raise ValueError(
            "sparse_gemm.cusparselt: the library compresses weights on the GPU, this one is on "
            f"{expanded.device}"
        )
    library = _library(expanded.device)
    padded = pad_rows(expanded, FEATURES_MULTIPLE)
    size, scratch = library.compressed_size(padded)
    out = torch.empty(size, dtype=torch.uint8, device=expanded.device)
    buffer = torch.empty(max(scratch, 1), dtype=torch.uint8, device=expanded.device)
    library.compress(padded, out, buffer)
    return out, out.new_empty(0)


def run(*arguments: *_packing.Arguments) -> torch.Tensor:
    """a [M, K'] contiguous, values from ``storage``; returns [M, N] bfloat16.

    Asynchronous on the current stream. The first call for a new bucket of M searches, which waits
    for the device. During a CUDA-graph capture nothing is searched: a shape whose bucket has not
    been searched runs with the library's default algorithm.
    """
    a, a_scale, values, _, w_scale, bias, features = arguments
    m = a.shape[0]
    a = pad_rows(a, TOKENS_MULTIPLE)
    padded = -(-features // FEATURES_MULTIPLE) * FEATURES_MULTIPLE
    fused_scale = w_scale if a.dtype == torch.int8 else None
    if fused_scale is not None and padded != features:
        fused_scale = pad(fused_scale, (0, padded - features))
    fused_bias = bias if a_scale is None and padded == features else None
    y = a.new_empty((a.shape[0], padded), dtype=torch.bfloat16)
    product = (a, values, fused_scale, fused_bias, y)
    library = _library(a.device)
    if not library.multiply(*product):
        library.adopt(*product, _find(library, *product))
        library.multiply(*product)
    if a_scale is None:
        out = y[:m, :features]
        if bias is not None and fused_bias is None:
            out = out + bias
        return out.contiguous()
    out = y[:m] if padded == features else y.new_empty((m, features))
    library.scale(y, a_scale, w_scale if fused_scale is None else None, bias, out)
    return out


def pad_rows(matrix: torch.Tensor, multiple: int) -> torch.Tensor:
    """The matrix itself if its number of rows is a multiple, else a copy with rows of zeros."""
    rows, columns = matrix.shape
    if rows % multiple == 0:
        return matrix
    out = matrix.new_zeros((rows + -rows % multiple, columns))
    out[:rows] = matrix
    return out


def _find(library: Any, *product: *Product) -> list[int]:
    a, _, _, bias, y = product
    m, k = a.shape
    key = (a.device, a.dtype, bucket(m), y.shape[1], k, bias is not None)
    with _searching:
        if key not in _settings:
            if torch.cuda.is_current_stream_capturing():
                return []
            _settings[key] = [int(value) for value in library.search(*product)]
        return _settings[key]
