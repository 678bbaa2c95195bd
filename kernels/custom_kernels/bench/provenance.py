# SPDX-License-Identifier: Apache-2.0
"""The machine and the sources of a run."""

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess

import torch

from custom_kernels import paths, registry
from custom_kernels.bench.plan import Plan
from custom_kernels.bench.record import Library, Provenance
from custom_kernels.compile import build, sources, toolchain
from custom_kernels.compile.toolchain import BuildError
from custom_kernels.source_hash import source_hash

PACKAGES = (
    "triton", "cupy-cuda13x", "vllm", "flashinfer-python",
    "nvidia-cublas", "nvidia-cusparselt-cu13",
)  # fmt: skip
"""Whose version a time may depend on, beside torch's."""


def provenance(device: torch.device, plan: Plan) -> Provenance:
    """Of a run of the plan on this GPU, now."""
    return machine(device, plan.command()).model_copy(update={"compiled": _compiled(plan, device)})


def machine(device: torch.device, command: str) -> Provenance:
    """Of a run on this GPU, now, that ``command`` repeats; without compiled libraries."""
    commit = _git("rev-parse", "HEAD")
    properties = torch.cuda.get_device_properties(device)
    return Provenance(
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        device=properties.name,
        sms=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        l2_bytes=properties.L2_cache_size,
        driver=_driver(device),
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        python=platform.python_version(),
        packages={name: version for name in PACKAGES if (version := _version(name))},
        git_commit=commit,
        git_dirty=None if commit is None else _dirty(),
        locks=_locks(),
        kernel_source_hash=source_hash(),
        tool_chain=_tool_chain(),
    )


def _compiled(plan: Plan, device: torch.device) -> dict[str, Library]:
    """The libraries of the timed backends; they exist, so nothing is compiled here."""
    architecture = sources.architecture(device)
    found = {}
    for backend in registry.compiled():
        asked_for = plan.backends is None or backend.name in plan.backends
        if backend.operation.name != plan.operation or not asked_for:
            continue
        try:
            built = build.build(backend, (architecture,))
        except BuildError:
            continue  # it was not timed either, and is among the skipped
        found[str(backend)] = Library(
            library=built.path.name, architectures=list(built.architectures)
        )
    return found


def _tool_chain() -> dict[str, str]:
    try:
        return toolchain.find().versions()
    except BuildError as error:
        return {"missing": str(error)}


def _locks() -> dict[str, str]:
    root = paths.checkout()
    files = sorted((root / "locks").glob("*.txt")) if root else []
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver(device: torch.device) -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output([*query, "-i", str(device.index)])


def _dirty() -> bool | None:
    status = _git("status", "--porcelain", "--untracked-files=all", "--", str(paths.PACKAGE))
    return None if status is None else bool(status)


def _git(*arguments: str) -> str | None:
    """The output of git in this checkout, whatever the user's settings, and whatever repository a
    surrounding hook names. None where the package is installed without its checkout."""
    root = paths.checkout()
    if root is None:
        return None
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    apart = {
        "HOME": os.devnull, "XDG_CONFIG_HOME": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1",
        "GIT_CEILING_DIRECTORIES": str(root.parent),
    }  # fmt: skip
    command = ["git", "-c", f"safe.directory={root}", "-c", "core.excludesFile=/dev/null"]
    return _output([*command, "-C", str(root), *arguments], kept | apart)


def _output(command: list[str], environment: dict[str, str] | None = None) -> str | None:
    """The output of a command; None if it fails."""
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
