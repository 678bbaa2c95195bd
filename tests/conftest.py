# SPDX-License-Identifier: Apache-2.0
"""What tests of several areas share."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from typing import Any

import hypothesis
import pytest

from tests import language_model
from workspace.container import docker
from workspace.host import git
from workspace.host.errors import WorkspaceError

# A shared machine stalls at times: no example is late.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")

# What a user's shell may say about terminals, whatever the tests are started from.
TERMINAL = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS")
TERMINAL += ("TTY_COMPATIBLE", "TTY_INTERACTIVE", "LANGUAGE")
# The longest first, so that no worker is left with one of them at the end.
SCOPES = {
    "newcomer": ("container/test_newcomer.py",),
    "container": ("tests/container/",),  # they share what they build
    # One engine at a time, for memory.
    "engine": (
        "test_second_release.py", "bench/test_run.py", "eval/test_eval_run.py",
        "trace/test_trace_run.py", "test_notebook_in_engine.py", "wheel/test_make.py",
    ),
    "programs": (
        "test_vllm.py", "test_vllm_quantization.py", "test_vllm_fusion.py", "test_dummy_weights.py",
    ),
    "build": ("fork/test_build.py",),
    "conda": ("test_conda_dev.py",),
    "unbundle": ("test_unbundle.py",),
}  # fmt: skip
NEEDED = {"gpu": "a GPU", "nvcc": "nvcc", "container": "a Docker engine and root"}


def pytest_configure() -> None:
    """The same words and lines on each machine; the tests' own servers are asked directly; the git
    that tests call themselves heeds neither a hook around us nor anybody's settings."""
    git.clear_repository_variables()
    os.environ |= {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_CONFIG_COUNT": "3",
        "GIT_CONFIG_KEY_0": "core.attributesFile",
        "GIT_CONFIG_VALUE_0": os.devnull,
        "GIT_CONFIG_KEY_1": "core.excludesFile",
        "GIT_CONFIG_VALUE_1": os.devnull,
        "GIT_CONFIG_KEY_2": "safe.directory",  # a CI may check out as somebody else
        "GIT_CONFIG_VALUE_2": "*",
    }
    for name in (*TERMINAL, "PYTEST_ADDOPTS"):  # the latter would change what pytests of ours print
        os.environ.pop(name, None)
    # Messages of compilers and other programs in English; characters stay as the user has them.
    if os.environ.get("LC_ALL", "").partition(".")[0] not in ("", "C", "POSIX"):
        os.environ["LC_CTYPE"] = os.environ.pop("LC_ALL")
    os.environ["LC_MESSAGES"] = "C"
    direct = ["127.0.0.1", "localhost", *os.environ.get("no_proxy", "").split(",")]
    direct += os.environ.get("NO_PROXY", "").split(",")
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, direct))
    # Without bytecode each process would compile torch and vLLM anew, which takes longer than
    # importing them.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    # Started in the background, the tests would have all that they start ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def trained_model() -> language_model.LanguageModel:
    """A small language model that was really trained; the first use takes a minute."""
    return language_model.trained()


def _gpu_missing() -> str | None:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else "torch sees no GPU"


def nvcc_missing() -> str | None:
    """None also where nvcc is missing though the release's packages hold one: then tests fail."""
    from custom_kernels.compile import toolchain

    from workspace.pins.model import load

    if load().release().cuda.packages_hold_nvcc:
        return None
    try:
        toolchain.find()
    except toolchain.NoCompiler as error:
        return str(error)
    return None


def _engine_missing() -> str | None:
    """Why the container tests cannot run here."""
    try:
        program = docker.client()
        docker.docker("info", "--format", "{{.ServerVersion}}")
    except WorkspaceError as error:
        return str(error)
    version = docker.docker("version", "--format", "{{.Client.Version}}")
    buildx = subprocess.run([program, "buildx", "version"], capture_output=True, check=False)
    if buildx.returncode and int(version.split(".")[0]) >= 23:
        return f"{program} has no buildx, without which it cannot build"
    if shutil.which("debootstrap") is None:
        return "debootstrap is missing, which makes the base image"
    return None if os.geteuid() == 0 else "debootstrap needs root"


def _scope(path: str) -> str:
    """What runs in one process, one test after the other: a file, or files that share something."""
    for name, ends in SCOPES.items():
        if path.startswith(ends) or path.endswith(ends):
            return name
    return path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers take scopes whole, in the order of the collection."""
    from xdist.scheduler import LoadScopeScheduling

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid.split("::", maxsplit=1)[0])

    config.option.loadscopereorder = False
    return ByScope(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of SCOPES; what the machine cannot run is skipped with the reason."""
    first = [*SCOPES]
    scopes = {item: _scope(item.nodeid.split("::")[0]) for item in items}
    items.sort(key=lambda item: first.index(scopes[item]) if scopes[item] in first else len(first))
    checks = (("gpu", _gpu_missing), ("nvcc", nvcc_missing), ("container", _engine_missing))
    for mark, missing in checks:
        marked = [item for item in items if item.get_closest_marker(mark)]
        reason = missing() if marked else None
        for item in marked if reason else []:
            item.add_marker(pytest.mark.skip(reason=f"needs {NEEDED[mark]}: {reason}"))
