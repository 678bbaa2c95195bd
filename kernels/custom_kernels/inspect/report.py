# SPDX-License-Identifier: Apache-2.0
"""The result of inspecting one kernel, from its compiler and its machine code."""

from dataclasses import dataclass

from custom_kernels.inspect.assembly import Code, Occupancy, occupancy


@dataclass(frozen=True, kw_only=True)
class Report(Code):
    """One kernel on one architecture."""

    operation: str = ""
    backend: str = ""
    architecture: str
    spills: int
    """Bytes per thread."""
    dynamic: bool
    """Whether the launch adds shared memory, so that ``shared`` is not all of it."""
    threads: int | None
    """Per block, where the compiler knows."""
    ptx: int | None
    """Instructions of its PTX."""
    loss: str = ""
    """What ptxas warns of as a loss of performance."""

    @property
    def occupancy(self) -> Occupancy | None:
        """None where the threads per block are not known, or the architecture is not."""
        if self.threads is None:
            return None
        return occupancy(self.architecture, self.threads, self.registers, self.shared)


class InspectionError(RuntimeError):
    """A kernel cannot be compiled. The message is the compiler's, with file and line."""
