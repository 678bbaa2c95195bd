# SPDX-License-Identifier: Apache-2.0
"""The smallest operation, y = 2x, for a copy of the package: tests add the backends."""

from collections.abc import Sequence

OPERATION = """
import torch
from custom_kernels import registry

BACKEND_PRIORITY = {"cuda": ("reference",), "cpu": ("reference",)}


def empty_output(x):
    return torch.empty_like(x)


def custom_toy(x, *, backend=None):
    run = registry.operation("toy").runner(backend or "reference", x.device, x.dtype)
    return run(x) if x.numel() else empty_output(x)
"""
REFERENCE = """
def run(x):
    return 2 * x


def exact(x):
    return 2 * x.double()
"""
CASES = """
import torch
from custom_kernels.check.case import Case

DTYPES = {dtypes}


def checks(dtype):
    for m in {rows}:
        yield Case(
            {{"M": m}},
            lambda device, m=m: (
                torch.empty(m, {width}, dtype=getattr(torch, dtype), device=device),
            ),
            lambda inputs: inputs[0].normal_(),
            {width}.0 * m,
            8.0 * {width} * m,
            1e-6,
        )
"""


def files(rows: Sequence[int], width: int, dtypes: Sequence[str] = ("float32",)) -> dict[str, str]:
    """File in the operation's folder → text: the operation, checked at these shapes."""
    cases = CASES.format(rows=tuple(rows), width=width, dtypes=tuple(dtypes))
    return {"__init__.py": OPERATION, "reference.py": REFERENCE, "cases.py": cases}
