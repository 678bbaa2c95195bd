# SPDX-License-Identifier: Apache-2.0
"""The reports of a backend's kernels for every pinned architecture, cached until it changes.

Comments at the start of a line declare properties of a file (``//`` in a ``.cu``, ``#`` in a
``.py``): ``architectures: 9.0a``, the only ones it is written for; ``spills: <reason>``,
``no tensor cores: <reason>`` and ``not deterministic: <reason>``, where that is on purpose. An
operation should use tensor cores if its ``__init__.py`` says ``USES_TENSOR_CORES = True``.

Reports are kept in the cache folder under the hash of all that they depend on, so that asking a
second time takes a fraction of a second.
"""

import ast
import hashlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from custom_kernels import paths, registry
from custom_kernels.command import write_whole
from custom_kernels.compile import build, ptx, sources
from custom_kernels.inspect import assembly, compilers
from custom_kernels.inspect import report as report_module
from custom_kernels.inspect.compilers import compile_here
from custom_kernels.inspect.report import InspectionError, Report
from custom_kernels.operation import Backend
from custom_kernels.source_hash import is_run_time

MULTIPLYING = frozenset({"cublas", "cublasLt", "cusparse", "cusparseLt"})
"""Libraries that multiply matrices on tensor cores."""
KEPT_REPORTS = 500
"""Reports that stay in the cache."""
_VERSIONS = (
    *("triton", "cupy-cuda13x", "cupy-cuda12x"),
    *("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "torch"),
)


def inspect(backend: Backend, wanted: Sequence[str] | None = None) -> list[Report]:
    """Every kernel of a backend on every architecture of ``wanted`` (default: the pinned ones) that
    it is written for; none for a backend that only calls torch.

    Compiles what was not compiled yet, in separate processes: no kernel is imported here.

    Raises:
        InspectionError, toolchain.BuildError: a kernel does not compile.
    """
    names = backend.architectures(wanted or sources.pinned_architectures())
    if backend.kind == "torch" or not names:
        return []
    cached = {name: _cached(backend, name) for name in names}
    missing = [name for name in names if not cached[name].is_file()]
    new = _in_own_process(backend, missing) if missing else {}
    for name, reports in new.items():
        _write(cached[name], reports)
    return [report for name in names for report in new.get(name) or _read(cached[name])]


def backend_of(report: Report) -> Backend:
    """The backend of a kernel."""
    return registry.operation(report.operation).backend(report.backend)


def warnings(reports: Sequence[Report]) -> list[str]:
    """What is wrong with kernels, unless the backend's file says that it is on purpose."""
    result = []
    by_backend: dict[Backend, list[Report]] = {}
    for report in reports:
        by_backend.setdefault(backend_of(report), []).append(report)
        where = f"{report.operation}.{report.backend}: {report.kernel} on {report.architecture}"
        if report.loss:
            result.append(f"{where}: ptxas warns: {report.loss}")
        if "spills" in backend_of(report).notes:
            continue
        if report.spills:
            result.append(f"{where} spills {report.spills} bytes")
        elif report.local:
            result.append(f"{where} uses local memory ({report.local} bytes, {report.stack} stack)")
    for backend, own in by_backend.items():
        if not backend.operation.uses_tensor_cores or "no tensor cores" in backend.notes:
            continue
        if MULTIPLYING & set(backend.notes.get("link", "").split()):
            continue  # the library multiplies; what is compiled here prepares and finishes
        result += [
            f"{backend} multiplies matrices without tensor-core instructions on {name}"
            for name in dict.fromkeys(report.architecture for report in own)
            if not any(report.tensor for report in own if report.architecture == name)
        ]
    return result


def _in_own_process(backend: Backend, names: Sequence[str]) -> dict[str, list[Report]]:
    """``compile_here`` in a process without Triton's interpreter, whatever this one uses."""
    if backend.kind == "cuda":
        reports = compilers.read_library(backend, names)
    else:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [
            sys.executable,
            "-c",
            "from custom_kernels.inspect import reports; reports.serve()",
        ]
        folder = str(paths.PACKAGE.parent)
        environment["PYTHONPATH"] = os.pathsep.join(
            [folder, *filter(None, [environment.get("PYTHONPATH")])]
        )
        result = subprocess.run(
            command,
            input=json.dumps([backend.operation.name, backend.name, list(names)]),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        answer = result.stdout.rpartition("\n\0")[2]
        if result.returncode != 0 or not answer:
            raise InspectionError(
                f"compiling {backend} ended with status {result.returncode}:\n"
                f"{(result.stdout + result.stderr).strip()}"
            )
        found = json.loads(answer)
        if "error" in found:
            raise InspectionError(found["error"])
        reports = [Report(**report) for report in found["reports"]]
    return {name: [one for one in reports if one.architecture == name] for name in names}


def serve() -> None:
    """Answer one request on standard input."""
    operation, name, architectures = json.load(sys.stdin)
    backend = registry.operation(operation).backend(name)
    answer: dict[str, Any]
    try:
        answer = {"reports": [asdict(one) for one in compile_here(backend, architectures)]}
    except InspectionError as error:
        answer = {"error": str(error)}
    # Compilers print: the answer is what follows the mark.
    print("\n\0" + json.dumps(answer))


def fingerprint(backend: Backend) -> str:
    """A hash of all files of this package that the backend is made of, without the tools."""
    digest = hashlib.sha256()
    for path in sorted({*_closure(backend), *sources.files(backend)}):
        digest.update(f"{path.relative_to(paths.PACKAGE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _cached(backend: Backend, architecture: str) -> Path:
    made_of = f"{backend} {architecture} {fingerprint(backend)}\0"
    digest = hashlib.sha256(made_of.encode())
    for reader in (assembly, compilers, ptx, report_module):
        digest.update(Path(str(reader.__file__)).read_bytes())
    if backend.kind == "cuda":
        digest.update(build.library_path(backend, (architecture,)).name.encode())
    for name in _VERSIONS:
        try:
            digest.update(f"{name} {importlib.metadata.version(name)}\0".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    return paths.cache_dir() / "inspections" / f"{backend}-{digest.hexdigest()[:20]}.json"


def _closure(backend: Backend) -> set[Path]:
    """The backend's Python file, all files of this package that it imports, directly or not, and
    the data beside it."""
    found: set[Path] = set()
    queue = [backend.operation.folder / f"{backend.name}.py"]
    while queue:
        path = queue.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        try:
            tree = ast.parse(path.read_text())
        except SyntaxError:
            continue  # the compiler will report it
        for node in ast.walk(tree):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for module in modules:
                first, *rest = module.split(".")
                if first == paths.PACKAGE.name and is_run_time(Path(*rest, "_")):
                    base = paths.PACKAGE.joinpath(*rest)
                    queue += [base.with_suffix(".py"), base / "__init__.py"]
    return found | set(backend.operation.folder.glob("*/*.json"))


def _read(path: Path) -> list[Report]:
    return [Report(**report) for report in json.loads(path.read_text())]


def _write(path: Path, reports: Sequence[Report]) -> None:
    text = json.dumps([asdict(report) for report in reports])
    write_whole(path, lambda partial: partial.write_text(text))
    kept = sorted(path.parent.glob("*.json"), key=lambda found: found.stat().st_mtime)
    for old in kept[:-KEPT_REPORTS]:
        old.unlink(missing_ok=True)
