# SPDX-License-Identifier: Apache-2.0
"""What a wheel holds: everything that is imported, and of other operations nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from custom_kernels import paths, registry

from workspace.host.errors import WorkspaceError
from workspace.wheel import contents

ALL = [str(one) for one in registry.operations()]


def test_all_operations_by_default_and_what_a_chosen_one_needs() -> None:
    assert contents.operations(None) == ALL
    assert contents.operations("silu_and_mul, rms_norm") == ["rms_norm", "silu_and_mul"]
    assert contents.operations("sparse_gemm") == ["quant_expand", "sparse_gemm"]


def test_an_unknown_operation_is_one_clear_error() -> None:
    with pytest.raises(WorkspaceError, match=r"OPS=gem: no such operation; use gemm, paged_att"):
        contents.operations("gem")


@pytest.mark.parametrize("ops", [None, *ALL])
def test_what_is_left_out_is_imported_by_nothing_that_stays(ops: str | None) -> None:
    files = contents.files(contents.operations(ops))
    assert {Path("vllm/plugin.py"), Path("py.typed"), Path("compile/build.py")} <= {*files}
    here = {path for path in files if path.suffix == ".py"}
    for path in here:
        for name in contents._imports(paths.PACKAGE / path, when_imported=True):
            modules = [name.replace(".", "/"), name.rpartition(".")[0].replace(".", "/")]
            found = {Path(f"{one}{end}") for one in modules for end in (".py", "/__init__.py")}
            assert found & here, f"{path} imports {name}"


def test_a_way_into_vllm_goes_with_its_operation() -> None:
    norms = {str(path) for path in contents.files(["rms_norm"])}
    assert "vllm/layers/rms_norm.py" in norms
    assert "rms_norm/cuda.cu" in norms
    assert "vllm/attention/__init__.py" in norms  # asked for its operation's name
    gone = {
        "vllm/gemm_hook.py", "vllm/layers/silu_and_mul.py", "vllm/quantization/sparse_2_4.py",
        "vllm/attention/_decode.py", "vllm/attention/gpu.py", "rms_norm/cases.py",
        "bench/__main__.py", "gemm/__init__.py",
    }  # fmt: skip
    assert not norms & gone
    assert all((paths.PACKAGE / name).is_file() for name in gone)
