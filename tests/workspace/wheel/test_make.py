# SPDX-License-Identifier: Apache-2.0
"""`make wheel`, and the wheel where there is no checkout and no compiler; then in vLLM."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from custom_kernels import registry, shipped
from custom_kernels.compile import sources
from packaging.utils import parse_wheel_filename

from tests.workspace.conftest import require_space
from workspace.fork.install import installer
from workspace.host.errors import WorkspaceError
from workspace.pins.release import selected
from workspace.verbs import Wheel, WheelVerify
from workspace.wheel import make, verify

GIGABYTES = 10
"""That an environment takes."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all operations and architectures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "DIST", tmp_path_factory.mktemp("dist"))
        return make.run(Wheel(name="my-kernels"))


@pytest.mark.nvcc
def test_it_is_small_complete_and_names_what_it_was_built_against(wheel: Path) -> None:
    name, version, _, tags = parse_wheel_filename(wheel.name)
    assert name == "my-kernels"
    assert {(tag.interpreter, tag.abi) for tag in tags} == {("py3", "none")}
    assert not {tag.platform for tag in tags} & {"any"}
    assert wheel.stat().st_size < 30e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = (one for one in names if one.endswith(".dist-info/METADATA"))
        about = Parser().parsestr(archive.read(info).decode())
        built = json.loads(archive.read("custom_kernels/_compiled/built.json"))
    assert about.get_all("Requires-Dist") == [
        f"{one}=={metadata.version(one).split('+')[0]}" for one in ("torch", "apache-tvm-ffi")
    ]
    assert not [one for one in names if "__pycache__" in one or "/bench/" in one]
    pinned = sources.pinned_architectures()
    assert built["libraries"] == {
        str(one): list(one.architectures(pinned)) for one in registry.compiled()
    }
    assert built["built_against"]["vllm"] == selected()
    assert (built["name"], built["version"]) == ("my-kernels", str(version))


WITHOUT_A_COMPILER = """
import json, logging, torch, tvm_ffi
from custom_kernels import custom_silu_and_mul, paths, registry, shipped
from custom_kernels.compile import build, sources, toolchain
logging.basicConfig(format="%(message)s")
try:
    toolchain.find()
    raise SystemExit("there is a compiler")
except toolchain.BuildError:
    pass
loaded = [str(tvm_ffi.load_module(str(build.existing(backend, architecture))))
          for backend in registry.compiled()
          for architecture in backend.architectures(sources.pinned_architectures())]
reason = build.unavailable_reason(registry.operation("gemm").backend("skinny"), "8.9")
shipped.built()["built_against"]["torch"] = "1.0"
shipped.warn("custom_kernels.vllm.plugin:register", shipped.built()["built_against"]["vllm"])
y = custom_silu_and_mul(torch.ones(2, 8))
print(json.dumps([str(paths.PACKAGE), str(paths.checkout()), len(loaded), reason, y.shape]))
"""


@pytest.mark.nvcc
def test_it_runs_where_there_is_no_checkout_and_no_compiler(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    command = [*installer(Path(sys.prefix)), "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True)
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(target), "PATH": "", "CUSTOM_KERNELS_CACHE": str(tmp_path / "c")},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    package, checkout, loaded, reason, shape = json.loads(ran.stdout.splitlines()[-1])
    assert Path(package) == target / "custom_kernels"
    assert checkout == "None"
    assert loaded == sum(
        len(one.architectures(sources.DEFAULT_ARCHITECTURES)) for one in registry.compiled()
    )
    assert reason is not None  # no library for 8.9, and nothing that makes one
    assert shape == [2, 4]
    assert not (tmp_path / "c").exists()
    # Beside the workspace's own, which is installed here, too.
    assert re.search(
        r"installed more than once: custom-kernels \S+ and my-kernels \S+; this process runs those "
        rf"in {re.escape(package)}, so uninstall the others",
        ran.stderr,
    )
    assert re.search(
        r"my-kernels \S+ was built against other versions: here is torch \S+ instead of 1\.0;",
        ran.stderr,
    )


def test_only_what_differs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    against = {"vllm": "0.32.0", "torch": "2.13.0"}
    monkeypatch.setattr(shipped, "built", lambda: {"built_against": against})
    assert shipped.differences({"vllm": "0.32.0+cpu", "torch": "2.13.0+cu130"}) == []
    assert shipped.differences({"vllm": "0.33.0", "torch": "2.13.0"}) == [
        "vllm 0.33.0 instead of 0.32.0"
    ]


def test_a_name_that_is_none_is_one_clear_error() -> None:
    with pytest.raises(WorkspaceError, match="NAME=my kernels: a package's name has letters"):
        make.run(Wheel(name="my kernels"))


def test_without_a_wheel_it_says_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "DIST", tmp_path)
    with pytest.raises(WorkspaceError, match="dist/ has no wheel to verify; run: make wheel"):
        verify.chosen(None)
    with pytest.raises(WorkspaceError, match=r"WHEEL=other\.whl is no wheel"):
        verify.chosen("other.whl")


def test_operations_are_those_of_the_wheel_that_enter_vllm() -> None:
    wheel = {"operations": ["gemm", "quant_expand", "rms_norm"], "layers": ["rms_norm"]}
    assert verify.entering(wheel, None) == {"gemm": None, "rms_norm": None}
    assert verify.entering(wheel, "rms_norm.triton") == {"rms_norm": "triton"}
    with pytest.raises(WorkspaceError, match="OPS=quant_expand: no layer of vLLM runs it; the wh"):
        verify.entering(wheel, "quant_expand")
    with pytest.raises(WorkspaceError, match="no layer of vLLM runs quant_expand, which is all"):
        verify.entering({"operations": ["quant_expand"], "layers": []}, None)


def test_what_did_not_run_is_named() -> None:
    ran = {7: {"model.norm": {"rms_norm.cuda": 3}, "lm_head": {}}}
    assert list(verify.missing(ran, {"rms_norm": None}, 1)) == [
        "layer lm_head of process 7 ran none of them"
    ]
    gemm = list(verify.missing(ran, {"rms_norm": None, "gemm": None}, 2))
    assert gemm[0] == "1 process ran the kernels, of 2"
    assert gemm[1].startswith("gemm did not run in process 7")


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.nvcc
def test_the_released_vllm_serves_with_it_in_an_environment_of_its_own(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    require_space(tmp_path, GIGABYTES)
    monkeypatch.setattr(verify, "FOLDER", tmp_path / "verify")
    monkeypatch.setattr(verify, "LOCK", tmp_path / "lock")
    verify.run(WheelVerify(wheel=str(wheel)))
    printed = capfd.readouterr()
    for kernel in ("gemm", "paged_attention", "rms_norm", "rotary_embedding", "silu_and_mul"):
        assert re.search(rf"{kernel}\.\w+ +│ +[1-9]", printed.out), printed.out
    assert f"{wheel.name}: proven with vLLM {selected()} as released" in printed.err
    assert not (tmp_path / "verify").exists()
