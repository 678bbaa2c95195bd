# SPDX-License-Identifier: Apache-2.0
"""What the cases of operations have in common that quantize each row: q in 8 bits and its scale."""

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from custom_kernels import registry
from custom_kernels.check.case import Contender

PLAIN = "none"
"""The label of a case that only quantizes."""


class Rounded(NamedTuple):
    """The result of a baseline that adds, divides or rounds otherwise than the definition. It need
    not be padded or expanded."""

    q: torch.Tensor
    scale: torch.Tensor


def contender(backend: registry.Backend, device: torch.device, dtype: str) -> Contender:
    """A backend of this package, which takes x in bfloat16 whatever the dtype of q."""
    return Contender(backend.name, backend.runner(device, torch.bfloat16))


def wrong_bytes(outputs: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]) -> float:
    """The share of bytes that differ; one NaN of float32 is as good as another."""
    different, count = 0, 0
    for output, right in zip(outputs, rights, strict=True):
        if output.shape != right.shape or output.dtype != right.dtype:
            return 1.0
        if output.dtype == torch.float32:
            same = (output == right) | (output.isnan() & right.isnan())
        else:
            same = output.view(torch.uint8) == right.view(torch.uint8)
        different += int((~same).sum()) * output.element_size()
        count += output.numel() * output.element_size()
    return different / max(count, 1)


def steps(q: torch.Tensor) -> torch.Tensor:
    """Codes as integers in the order of the values, neighbours next to each other."""
    if q.dtype == torch.int8:
        return q.int()
    codes = q.view(torch.uint8).int()
    return torch.where(codes < 0x80, codes, 0x80 - codes)


def too_far(
    outputs: Rounded, right: torch.Tensor, right_scale: torch.Tensor, most: int, share: float
) -> float:
    """The share of values of q that are more than ``most`` steps off, and of scales that are by
    more than this share."""
    off = (steps(outputs.q) - steps(right)).abs() > most
    off_scale = (outputs.scale.view(-1) - right_scale).abs() > share * right_scale
    return float(torch.cat([off.flatten(), off_scale]).float().mean())


def vllm_quantize(x: torch.Tensor, dtype: torch.dtype) -> Rounded:
    """vLLM's own quantization of every row to int8 or float8_e4m3fn."""
    ops = importlib.import_module("vllm._custom_ops")
    if dtype == torch.int8:
        q, scale, _ = ops.scaled_int8_quant(x)
    else:
        q, scale = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
    return Rounded(q, scale)
