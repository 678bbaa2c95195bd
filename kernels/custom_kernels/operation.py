# SPDX-License-Identifier: Apache-2.0
"""What an operation's backends declare of themselves."""

from dataclasses import dataclass, field
from typing import Any


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
    architectures: tuple[str, ...] = ()
    """The only ones on which it is launched; empty: all."""
