# SPDX-License-Identifier: Apache-2.0
"""Nsight Compute on one call of a backend (``make profile``) or on kernels of a notebook: figures,
what bounds the kernel, the source lines at which its warps wait, and what changed since last time.

In the order of a run: ``choice`` says what is called, ``ncu`` runs NVIDIA's program over the
process in ``profiled`` and prints its report, ``figures`` and ``source`` read that, ``records``
keeps it, ``text`` shows it; ``runs`` puts it together.
"""

from custom_kernels.profile.figures import Profile
from custom_kernels.profile.profiled import Launch, run_launches
from custom_kernels.profile.records import Recorded, read, write
from custom_kernels.profile.runs import Run, of_backend, of_command, of_launches
from custom_kernels.profile.source import Line
from custom_kernels.profile.text import bound, difference, report, table

__all__ = [
    "Launch", "Line", "Profile", "Recorded", "Run", "bound", "difference", "of_backend",
    "of_command", "of_launches", "read", "report", "run_launches", "table", "write",
]  # fmt: skip
