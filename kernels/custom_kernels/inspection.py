# SPDX-License-Identifier: Apache-2.0
"""What the compilers make of every kernel, for a GPU that need not be there."""

from dataclasses import dataclass, field
from typing import Any

from custom_kernels import build


@dataclass(frozen=True)
class Specialization:
    """One variant of a Triton kernel, as a launch on a GPU would compile it.

    A Triton backend lists its own in ``specializations()``, made by the function with which the
    launch chooses its constants, so that the two cannot drift apart.
    """

    kernel: Any
    """The function under ``@triton.jit``."""
    signature: dict[str, str]
    """The type of each argument that is not a constant: ``{"x": "*bf16", "rows": "i32"}``."""
    constexprs: dict[str, Any] = field(default_factory=dict)
    """The value of each ``tl.constexpr`` argument."""
    num_warps: int = 4
    num_stages: int = 3
    label: str = ""
    """What tells it from the kernel's other variants, for example ``"M <= 16"``."""
    aligned: tuple[str, ...] = ()
    """Pointers and integers that a launch finds to be multiples of 16."""


def nvrtc_includes() -> tuple[str, ...]:
    """Options with which NVRTC finds CUDA's headers, for the ``options`` of a ``cupy.RawKernel``.

    Empty where there are none: CuPy then looks for headers of its own.
    """
    return tuple(f"-I{folder}" for folder in build.include_folders())
