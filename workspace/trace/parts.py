# SPDX-License-Identifier: Apache-2.0
"""What each piece of a step belongs to: a layer, or what its kernel does.

Where the trace says in which module a piece was launched (not compiled), that is the answer. A
compiled model and CUDA graphs leave names and order: a step multiplies once for each linear layer,
so if it has as many products as the model has linear layers, they are these layers one after the
other, and everything else lies between two of them. Kernels whose name says what they do are named
so; the rest by the place where they are.
"""

import re
from collections.abc import Iterator, Sequence

from workspace.bench.layers import folded
from workspace.bench.worker import HEAD, SAMPLER
from workspace.trace.timeline import Piece, Step

OTHER = "not attributed"
BETWEEN = "preparing a step"
"""What is launched before the model."""
SAMPLING = "sampling"
COMMUNICATION = "communication"
LM_HEAD = "lm_head"

KINDS = (
    (COMMUNICATION, r"nccl|all_?reduce|cross_device|all_?gather|reduce_scatter"),
    ("KV cache", r"reshape_and_cache|kv_?cache|concat_and_cache"),
    ("attention", r"attn|attention|flash|fmha|paged|\battend\b|softmax_lse"),
    ("quantization", r"quant|scaled_fp8|expand_rows|whole_rows|tiled_rows"),
    ("norm", r"rms|norm|rsqrt"),
    ("activation", r"silu|gelu|swiglu|sigmoid|act_and_mul"),
    ("rotary embedding", r"rotary|rope|rotate"),
    ("embedding", r"embedding"),
)
"""By the kernel's name, the first that matches. Fused ones are what the first of their ops is."""
_KINDS = [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in KINDS]
_PRODUCT = re.compile(
    r"gemm|gemv|nvjet|cutlass(?!.*attn)|xmma|wgmma|cublas|\bmultiply|\bskinny|::mm\b|addmm|linear",
    re.IGNORECASE,
)
_FUSED = re.compile(r"triton_(?:poi|red|per)_fused_")
"""Inductor's: no products, though products beside which they were fused may be in their names."""
_REST_OF_PRODUCT = re.compile(r"split_?k_?reduce|\badd_parts\b|\bscale_rows\b", re.IGNORECASE)
"""A second kernel of the product before it."""


def attribute(step: Step, linear: Sequence[str]) -> list[tuple[str, Piece]]:
    """Each piece of the step with what it belongs to.

    Args:
        linear: the names of the model's linear layers in their order, the output head among them.
    """
    if any(piece.layers and piece.layers[0] not in (HEAD, SAMPLER) for piece in step.pieces):
        return [(_by_range(piece), piece) for piece in step.pieces]
    return list(_by_order(step.pieces, linear))


def _by_range(piece: Piece) -> str:
    if not piece.layers:
        return _kind(piece.name, (COMMUNICATION,)) or BETWEEN
    if (kind := _kind(piece.name, (COMMUNICATION,))) is not None:
        return kind
    if SAMPLER in piece.layers:
        return SAMPLING
    innermost = piece.layers[-1]
    return LM_HEAD if innermost == HEAD else short(innermost)


def _by_order(pieces: Sequence[Piece], linear: Sequence[str]) -> Iterator[tuple[str, Piece]]:
    products = _products(pieces)
    count = len(set(products) - {None})
    known = count == len(linear)
    names = [short(name) for name in linear] if known else []
    done = -1  # products so far
    for piece, product in zip(pieces, products, strict=True):
        if product is not None:
            done = product
            yield names[product] if known else "linear layers", piece
        elif SAMPLER in piece.layers or (known and done == count - 1):
            yield SAMPLING, piece
        elif kind := _kind(piece.name):
            yield kind, piece
        elif done < 0:
            yield BETWEEN, piece
        elif known:
            yield f"between {names[done]} and {names[done + 1]}", piece
        else:
            yield OTHER, piece


def _products(pieces: Sequence[Piece]) -> list[int | None]:
    """The number of the product that a piece is or is a part of, None for others."""
    result: list[int | None] = []
    count = 0
    for piece in pieces:
        if _REST_OF_PRODUCT.search(piece.name):
            result.append(result[-1] if result else None)
        elif _is_product(piece.name):
            result.append(count)
            count += 1
        else:
            result.append(None)
    return result


def _is_product(name: str) -> bool:
    if _FUSED.match(name) or _kind(name, ("attention",)):
        return False
    return _PRODUCT.search(name) is not None


def _kind(name: str, wanted: Sequence[str] = ()) -> str | None:
    for kind, pattern in _KINDS:
        if (not wanted or kind in wanted) and pattern.search(name):
            return kind
    return None


def short(layer: str) -> str:
    """ "model.layers.3.mlp.down_proj" -> "mlp.down_proj"."""
    return folded(layer).rpartition("*.")[2]
