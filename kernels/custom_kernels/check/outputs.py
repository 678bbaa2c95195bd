# SPDX-License-Identifier: Apache-2.0
"""The error of outputs against the exact result, and poison for memory that is not written."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from custom_kernels.check.case import Case

_CHECKED_ROWS = 48
_POISON: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float64: (torch.int64, 0x7FF8_0000_0000_D1E5),
    torch.float32: (torch.int32, 0x7FC0_D1E5),
    torch.float16: (torch.int16, 0x7ED1),
    torch.bfloat16: (torch.int16, 0x7FD1),
    torch.float8_e4m3fn: (torch.uint8, 0x7F),
    torch.float8_e5m2: (torch.uint8, 0x7D),
    torch.int8: (torch.int8, -128),
}
"""Bits that no kernel writes: a NaN that arithmetic does not produce (in e4m3 the only NaN), and
the int8 that symmetric quantization does not use."""


class WrongResultError(RuntimeError):
    """A contender does not compute what the reference does, so its time is meaningless."""


def tensors(structure: Any) -> Iterator[torch.Tensor]:
    """The plain tensors in nested tuples, lists and dicts, and inside of tensor subclasses."""
    if isinstance(structure, torch.Tensor):
        if is_traceable_wrapper_subclass(structure):
            names, _ = structure.__tensor_flatten__()
            for name in names:
                yield from tensors(getattr(structure, name))
        else:
            yield structure
    elif isinstance(structure, (tuple, list)):
        for item in structure:
            yield from tensors(item)
    elif isinstance(structure, dict):
        yield from tensors(tuple(structure.values()))


def poison(outputs: Any) -> None:
    """Fill outputs with what no kernel writes; in dtypes without such a value, with an unlikely
    value."""
    for output in tensors(outputs):
        if output.dtype in _POISON:
            bits, pattern = _POISON[output.dtype]
            output.view(bits).fill_(pattern)
        elif output.dtype == torch.bool:
            output.fill_(True)
        elif output.is_complex():
            output.fill_(complex(math.nan, math.nan))
        elif output.is_floating_point():
            output.fill_(math.nan)
        else:
            # Unsigned dtypes have no unusual value.
            output.fill_(torch.iinfo(output.dtype).min or 0xA5)


def unwritten(outputs: Any) -> int:
    """Number of elements that are still poisoned, in the dtypes of ``_POISON``."""
    count = 0
    for output in tensors(outputs):
        if output.dtype in _POISON:
            bits, pattern = _POISON[output.dtype]
            count += int((output.view(bits) == pattern).sum())
    return count


class PoisonedMemory(TorchDispatchMode):
    """Within it, memory that torch allocates uninitialized is poisoned.

    It shows an output that a kernel forgot, without a CUDA graph whose outputs could be poisoned
    before a replay. It sees what Python code allocates, not what an operator allocates inside.
    """

    _EMPTY = frozenset(
        {
            torch.ops.aten.empty,
            torch.ops.aten.empty_like,
            torch.ops.aten.empty_strided,
            torch.ops.aten.new_empty,
            torch.ops.aten.new_empty_strided,
        }
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in self._EMPTY:
            poison(out)
        return out


def error_of(case: "Case", inputs: Sequence[Any], outputs: Any, exact: Callable[..., Any]) -> float:
    """The error of outputs that were poisoned before the call.

    Raises:
        WrongResultError: it is larger than the case allows, or an element was not written.
    """
    left = unwritten(outputs)
    if left:
        raise WrongResultError(f"{left} elements of the output were not written")
    if case.error is not None:
        error = case.error(inputs, outputs)
    else:
        for output in tensors(outputs):
            if output.is_floating_point() and not torch.isfinite(output.float()).all():
                raise WrongResultError("the output has elements that are not finite")
        error = _relative_error(case, inputs, outputs, exact)
    if not error <= case.tolerance:
        raise WrongResultError(f"error {error:.1e}, {case.tolerance:.1e} is allowed")
    return error


def _relative_error(
    case: "Case", inputs: Sequence[Any], outputs: Any, exact: Callable[..., Any]
) -> float:
    x = inputs[0]
    # The first, the last and others by chance: nobody can compute only those that are looked at.
    chosen = torch.randperm(x.shape[0])[:_CHECKED_ROWS].tolist()
    ends = [0, x.shape[0] - 1] if chosen else []
    rows = torch.tensor(sorted({*ends, *chosen}), dtype=torch.long, device=x.device)
    some = [
        one[rows] if index in case.per_token and one is not None else one
        for index, one in enumerate(inputs)
    ]
    wanted = list(tensors(exact(*some)))
    worst = 0.0
    for output, right in zip(tensors(outputs), wanted, strict=True):
        # What is left out by an option is empty, and has no rows.
        got, right = (output[rows] if right.numel() else output).double(), right.double()
        if got.shape != right.shape:
            raise WrongResultError(
                f"the output has shape {list(output.shape)}, its rows should be "
                f"{list(right.shape[1:])}"
            )
        size = float(right.norm())
        worst = max(worst, float((got - right).norm()) / (size or 1.0))
    return worst


def one_line(error: Exception) -> str:
    """The first line of an exception's message, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else "no message"
    return first if isinstance(error, WrongResultError) else f"{type(error).__name__}: {first}"
