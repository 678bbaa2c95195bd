# SPDX-License-Identifier: Apache-2.0
"""What an implementation must leave alone for its result and its time to mean something."""

import contextlib
import ctypes
import time
from collections.abc import Iterator
from typing import Any

import torch

from custom_kernels.check.outputs import WrongResultError, tensors

_MEASURED_BY = [
    (time, "perf_counter"),
    (torch.cuda, "Event"),
    (torch.cuda.Event, "record"),
    (torch.cuda.Event, "elapsed_time"),
    (torch.cuda, "CUDAGraph"),
    (torch.cuda.CUDAGraph, "replay"),
    (torch.cuda, "synchronize"),
]
_ORIGINALS = [getattr(owner, name) for owner, name in _MEASURED_BY]

_PERSISTING_L2 = 6
"""CU_LIMIT_PERSISTING_L2_CACHE_SIZE of CUDA's driver."""


@contextlib.contextmanager
def kept_inputs(inputs: Any) -> Iterator[None]:
    """What runs within it must not change these tensors: the exact result is made of them.

    Raises:
        WrongResultError: it did.
    """
    before = [(one, one.clone()) for one in tensors(inputs)]
    yield
    for number, (one, copy) in enumerate(before):
        if not same_bits(one, copy):
            raise WrongResultError(f"it wrote over its input {number}")


def require_own_memory(outputs: Any, others: Any, what: str) -> None:
    """Raise if an output has memory in common with one of the others.

    Raises:
        WrongResultError: with ``what`` they are.
    """
    taken = {one.untyped_storage().data_ptr() for one in tensors(others) if one.numel()}
    for output in tensors(outputs):
        if output.numel() and output.untyped_storage().data_ptr() in taken:
            raise WrongResultError(f"its output is in the memory of {what}")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of a shape and dtype are equal bit by bit: so a NaN equals itself."""
    return not different(one, other).any()


def different(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Which elements differ in a bit."""
    bits = [
        tensor.contiguous().view(torch.uint8).view(*tensor.shape, tensor.itemsize)
        for tensor in (one, other)
    ]
    return (bits[0] != bits[1]).any(-1)


def require_own_clocks() -> None:
    """Raise if something replaced what times are taken with, and put it back.

    Raises:
        WrongResultError: what was replaced.
    """
    for (owner, name), original in zip(_MEASURED_BY, _ORIGINALS, strict=True):
        if getattr(owner, name) is not original:
            setattr(owner, name, original)
            raise WrongResultError(f"it replaced {owner.__name__}.{name}, by which it is timed")


class L2:
    """The share of a GPU's L2 that its context sets aside for accesses that persist: what stays
    there between two calls would not come from HBM as it does in inference."""

    def __init__(self, device: torch.device) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1") if device.type == "cuda" else None
        self._before = self._limit()

    def require_unchanged(self) -> None:
        """Raise if it changed, and change it back.

        Raises:
            WrongResultError: it changed.
        """
        if self._driver is not None and (now := self._limit()) != self._before:
            self._driver.cuCtxSetLimit(_PERSISTING_L2, ctypes.c_size_t(self._before))
            self._driver.cuCtxResetPersistingL2Cache()
            self._before = self._limit()  # of one that cannot be set, others are not to blame
            raise WrongResultError(f"it set aside {now:,} bytes of L2 for itself")

    def _limit(self) -> int:
        value = ctypes.c_size_t(0)
        if self._driver is not None:
            self._driver.cuCtxGetLimit(ctypes.byref(value), _PERSISTING_L2)
        return value.value
