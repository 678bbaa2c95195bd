# SPDX-License-Identifier: Apache-2.0
"""Every backend of every operation, as the folders hold them: a file that is dropped in is tested
by ``make test K=<operation>`` without a test being written."""

from __future__ import annotations

import pytest
import torch
from custom_kernels import registry
from custom_kernels.check.check import check

BACKENDS = registry.select([])
MEASURED = [one for one in registry.operations() if (one.folder / "cases.py").is_file()]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_every_case_is_right(backend: registry.Backend) -> None:
    if backend.operation not in MEASURED:
        pytest.skip(f"{backend.operation} has no cases.py, which says what to check")
    devices = [torch.device("cuda", 0)] if torch.cuda.is_available() else []
    reasons = []
    for device in [*devices, torch.device("cpu")]:
        reason = backend.unavailable_reason(device)
        if reason is None:
            break
        reasons.append(f"{device.type}: {reason}")
    else:
        pytest.skip("; ".join(reasons))
    found = check(backend, device)
    assert found
    assert [str(one) for one in found if one.failure is not None] == []


@pytest.mark.parametrize("operation", MEASURED, ids=str)
def test_checks_hold_one_row(operation: registry.Operation) -> None:
    """What an engine sends when it decodes for one request."""
    cases = operation.cases
    for dtype in cases.DTYPES:
        inputs = [case.empty_inputs(torch.device("cpu")) for case in cases.checks(dtype)]
        assert 1 in {first.shape[0] for first, *_ in inputs}
