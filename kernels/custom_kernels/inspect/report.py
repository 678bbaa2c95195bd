# SPDX-License-Identifier: Apache-2.0
"""One kernel on one architecture: what its compiler and its machine code say."""

from dataclasses import dataclass

from custom_kernels.inspect import assembly


@dataclass(frozen=True)
class Report:
    """One kernel on one architecture. Sizes are in bytes; registers, stack and spills per thread,
    shared memory per block."""

    operation: str
    backend: str
    kernel: str
    architecture: str
    registers: int
    stack: int
    spills: int
    local: int
    """What its instructions move to and from local memory, spills included, each counted once."""
    shared: int
    dynamic: bool
    """Whether the launch adds shared memory, so that ``shared`` is not all of it."""
    threads: int | None
    """Per block, where the compiler knows."""
    ptx: int | None
    """Instructions of its PTX."""
    sass: int
    """Size of its machine code."""
    tensor: dict[str, int]
    """How often each tensor-core instruction stands in it; sparse forms end in ``.SP``."""
    load: str
    """The widest load from global memory."""
    store: str

    @property
    def occupancy(self) -> assembly.Occupancy | None:
        """None where the threads per block are not known, or the architecture is not."""
        if self.threads is None:
            return None
        return assembly.occupancy(self.architecture, self.threads, self.registers, self.shared)


class InspectionError(RuntimeError):
    """A kernel cannot be compiled. The message holds the compiler's own words, with file and
    line."""
