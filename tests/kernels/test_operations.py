# SPDX-License-Identifier: Apache-2.0
"""Every backend of every operation, as the folders hold them: a file that is dropped in is tested
by ``make test K=<operation>`` without a test being written."""

from __future__ import annotations

import pytest
import torch
from custom_kernels import paths, registry
from custom_kernels.check.case import definition
from custom_kernels.check.check import check

BACKENDS = [
    (operation, backend)
    for operation in registry.operations()
    for backend in sorted(registry.backend_files(operation))
]
MEASURED = [name for name in registry.operations() if (paths.PACKAGE / name / "cases.py").is_file()]


@pytest.mark.parametrize(("operation", "backend"), BACKENDS, ids=map(".".join, BACKENDS))
def test_every_case_is_right(operation: str, backend: str) -> None:
    if operation not in MEASURED:
        pytest.skip(f"{operation} has no cases.py, which says what to check")
    devices = [torch.device("cuda", 0)] if torch.cuda.is_available() else []
    reasons = []
    for device in [*devices, torch.device("cpu")]:
        reason = registry.available(operation, backend, device)
        if reason is None:
            break
        reasons.append(f"{device.type}: {reason}")
    else:
        pytest.skip("; ".join(reasons))
    found = check(operation, backend, device)
    assert found
    assert [str(one) for one in found if one.failure is not None] == []


@pytest.mark.parametrize("operation", MEASURED)
def test_checks_hold_one_row(operation: str) -> None:
    """What an engine sends when it decodes for one request."""
    cases = definition(operation)
    for dtype in cases.DTYPES:
        inputs = [case.empty_inputs(torch.device("cpu")) for case in cases.checks(dtype)]
        assert 1 in {first.shape[0] for first, *_ in inputs}
