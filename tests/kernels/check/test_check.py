# SPDX-License-Identifier: Apache-2.0
"""The check must not be fooled: backends that are wrong in all the ways it claims to find."""

from __future__ import annotations

import re

import pytest
import torch
from custom_kernels.check.case import Case, Contender
from custom_kernels.check.check import check_case

from tests.kernels.conftest import PackageCopy
from tests.kernels.toy import files as toy_files

RIGHT = """
import torch


def run(x):
    assert x.numel()
    y = torch.empty_like(x)
    y.copy_(2 * x)
    return y
"""


@pytest.fixture
def toy(package_copy: PackageCopy) -> PackageCopy:
    for name, text in toy_files((0, 1, 3), 8, ("float32", "bfloat16")).items():
        package_copy.add(f"toy/{name}", text)
    return package_copy


def test_a_right_backend_is_right_in_every_dtype(toy: PackageCopy) -> None:
    toy.add("toy/mine.py", RIGHT)
    result = toy.python("-m", "custom_kernels.check", "toy")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^toy\.mine on \w+.*: 6 of 6 cases right", result.stdout, re.MULTILINE)
    assert re.search(r"^toy\.reference on \w+.*: 6 of 6 cases right", result.stdout, re.MULTILINE)
    quick = toy.python("-m", "custom_kernels.check", "toy.mine", "--quick")
    assert ": 3 of 3 cases right" in quick.stdout


WRONG = {
    "one_element": ("    return y", "    y[-1, 5] = 7\n    return y",
                    r"M=3: error .*; first at output\[2, 5\]: 7"),
    "not_written": ("y.copy_(2 * x)", "y[:, :7].copy_(2 * x[:, :7])",
                    r"M=3: 3 elements of the output were not written; first at .*\[0, 7\]: nan"),
    "remembers": ("    return y", "    return kept.setdefault(x.shape, y).clone()",
                  r"M=1: error .*; first at output"),
    "keeps_memory": ("    return y", "    return kept.setdefault(x.shape, y).copy_(y)",
                     r"M=1: its output is in the memory of the call before"),
    "overwrites": ("    return y", "    x.zero_()\n    return torch.zeros_like(y)",
                   r"M=1: it wrote over its input 0"),
    "varies": ("y.copy_(2 * x)", "y.copy_(2 * x + 4e-7 * torch.rand(()))",
               r"two calls on the same inputs differ, first at \["),
    "shape": ("return y", "return y[:, :4]", r"has shape \[3, 4\]"),
    "raises": ("y = torch", "raise ValueError('no such luck')\n    y = torch",
               r"raises\.py:\d+: ValueError: no such luck"),
    "infinite": ("    return y", "    y[0, 0] = float('inf')\n    return y", r"not finite"),
}  # fmt: skip
"""Backends that are wrong: what is put in place of what, and what the check says of it."""


def test_a_wrong_backend_is_found(toy: PackageCopy) -> None:
    for name, (old, new, _) in WRONG.items():
        assert old in RIGHT
        toy.add(f"toy/{name}.py", "kept = {}\n" + RIGHT.replace(old, new))
    by_intent = toy.package / "toy" / "varies.py"
    toy.add("toy/on_purpose.py", f"# not deterministic: any order\n{by_intent.read_text()}")
    result = toy.python("-m", "custom_kernels.check", "toy", "--dtype", "float32")
    assert result.returncode == 1
    found = dict(re.findall(r"^toy\.(\w+) on (.*(?:\n  .*)*)", result.stdout, re.MULTILINE))
    for name, (_, _, said) in WRONG.items():
        assert re.search(said, found[name]), found[name]
    assert "3 of 3 cases right" in found["on_purpose"]
    assert "3 of 3 cases right" in found["reference"]


def test_a_bare_check_neither_poisons_nor_captures(toy: PackageCopy) -> None:
    """Nor does it let anything pass that is wrong."""
    looks = "from torch.utils._python_dispatch import _get_current_dispatch_mode as mode\n"
    looks += RIGHT.replace("    y = torch", "    assert mode() is None\n    y = torch")
    capture = "assert not (x.is_cuda and torch.cuda.is_current_stream_capturing())"
    toy.add("toy/mine.py", looks.replace("assert x.numel()", capture))
    toy.add("toy/wrong.py", RIGHT.replace("2 * x", "3 * x"))
    assert "mine.py:8: AssertionError" in toy.python("-m", "custom_kernels.check", "toy").stdout
    result = toy.python("-m", "custom_kernels.check", "toy", "--bare", "--quick")
    assert result.returncode == 1
    assert re.search(r"^toy\.mine on .*: 3 of 3 cases right", result.stdout, re.MULTILINE)
    assert re.search(r"^toy\.wrong on .*: 1 of 3 cases right", result.stdout, re.MULTILINE)


def test_what_cannot_be_checked_says_why(toy: PackageCopy) -> None:
    toy.add("toy/gpu.py", "import cupy\n")
    toy.add("toy/narrow.py", "import torch\nDTYPES = (torch.int8,)\n" + RIGHT)
    toy.add("other/reference.py", "")
    toy.add("other/__init__.py", "")
    result = toy.python("-m", "custom_kernels.check", "toy.narrow", "other")
    assert result.returncode == 0
    assert "toy.narrow: not checked: toy.narrow does not support" in result.stdout
    assert "other.reference: not checked: other has no cases.py" in result.stdout
    if not torch.cuda.is_available():
        result = toy.python("-m", "custom_kernels.check", "toy.gpu")
        assert "it runs on CUDA devices only" in result.stdout


@pytest.mark.gpu
def test_a_result_that_is_not_made_again_in_a_graph_is_found() -> None:
    device = torch.device("cuda", 0)
    kept: list[torch.Tensor] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            return kept[-1]  # computed before the capture: a replay does nothing
        kept.append(2 * x)
        return kept[-1]

    case = Case(
        {"M": 4},
        lambda device: (torch.empty(4, 8, device=device),),
        lambda inputs: inputs[0].normal_(),
        1.0,
        1.0,
        1e-6,
    )
    found = check_case(Contender("cheat", run), case, lambda x: 2 * x.double(), device)
    assert found.failure is not None
    assert "replayed from a CUDA graph" in found.failure
