# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels of a backend, without a GPU, and read the result.

- CUDA C++: the library of ``custom_kernels.compile``.
- Triton: the backend's ``specializations()``, compiled as a launch would.
- CuPy: every ``RawKernel`` in the backend's module (also in a dict, list or tuple), by CuPy's own
  code, with the options and headers of a launch. CuPy compiles for ``sm_90`` where the others
  compile for ``sm_90a``, so its kernels have no wgmma.
"""

import importlib
import io
import os
import re
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from custom_kernels import paths
from custom_kernels.compile import build, ptx, sources
from custom_kernels.compile.toolchain import BuildError
from custom_kernels.inspect import assembly
from custom_kernels.inspect.report import InspectionError, Report
from custom_kernels.operation import Backend, Specialization


def compile_here(backend: Backend, names: Sequence[str], most: int | None = None) -> list[Report]:
    """``reports.inspect`` without cache, in this process.

    Args:
        most: compile only so many specializations of a Triton backend, some of each kernel.

    A Triton backend must have been imported without Triton's interpreter.
    """
    if backend.kind == "cuda":
        return read_library(backend, names)
    if backend.kind == "torch":
        return []
    jobs = list(_jobs(backend, names))
    return _run_jobs(_some(jobs, most) if most and len(jobs) > most else jobs)


def read_library(backend: Backend, names: Sequence[str]) -> list[Report]:
    """Of a backend in CUDA C++, compiled first if need be."""
    pinned = sources.pinned_architectures()
    # One library has all pinned architectures; what is compiled already is not compiled again.
    whole = set(names) <= set(pinned) and build.library_path(backend, pinned).is_file()
    built = build.build(backend, pinned if whole else names)
    reports = []
    for name in names:
        compiled = {kernel.name: kernel for kernel in built.kernels if kernel.architecture == name}
        if not compiled:
            continue
        codes = assembly.read(built.path, name)
        for kernel, code in zip(ptx.demangle([code.kernel for code in codes]), codes, strict=True):
            if known := compiled.get(kernel):
                figures = {"spills": known.spill_stores + known.spill_loads, "ptx": known.ptx}
                for figure in ("shared", "threads", "dynamic", "loss"):
                    figures[figure] = getattr(known, figure)
                reports.append(_report(code, backend, kernel=kernel, architecture=name, **figures))
    return reports


@dataclass(frozen=True)
class _Job:
    """One compilation: a Triton specialization, or a RawKernel with its label."""

    backend: Backend
    architecture: str
    item: Any


def _jobs(backend: Backend, names: Sequence[str]) -> Iterator[_Job]:
    module = _import(backend)
    items: Sequence[Any]
    if backend.kind == "triton":
        if not hasattr(module, "specializations"):
            raise InspectionError(
                f"{module.__file__} has no specializations(), which says what its launches "
                "compile; kernels/README.md shows one"
            )
        try:
            items = module.specializations()
        except Exception as error:
            raise InspectionError(explain(error)) from error
    else:
        items = _raw_kernels(module)
    for name in names:
        for item in items:
            only = getattr(item, "architectures", ())
            if not only or name in only:
                yield _Job(backend, name, item)


def _some(jobs: Sequence[_Job], most: int) -> list[_Job]:
    """``most`` of the jobs, all kernels in turn, spread over what each has."""
    kernels: dict[int, list[_Job]] = {}
    for job in jobs:
        kernels.setdefault(id(getattr(job.item, "kernel", job)), []).append(job)
    groups = list(kernels.values())[:most]
    shares = [most // len(groups) + (index < most % len(groups)) for index in range(len(groups))]
    return [
        group[round(step * (len(group) - 1) / max(1, min(share, len(group)) - 1))]
        for group, share in zip(groups, shares, strict=True)
        for step in range(min(share, len(group)))
    ]


def _run_jobs(jobs: Sequence[_Job]) -> list[Report]:
    """Run all, in parallel.

    Raises:
        InspectionError: some failed; the messages of all of these.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    global _shared_jobs
    _shared_jobs = list(jobs)
    if len(jobs) == 1:
        found = [_run_shared(0)]
    else:
        # Forked: kernels are functions that cannot be sent, and imports cost seconds.
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
            found = list(pool.map(_run_shared, range(len(jobs))))
    # The messages are mostly the same for every dtype and architecture: show each once.
    errors = {error.partition("\n")[2] or error: error for error in found if isinstance(error, str)}
    if errors:
        raise InspectionError("\n\n".join(errors.values()))
    return [report for one in found if not isinstance(one, str) for report in one]


_shared_jobs: list[_Job] = []


def _run_shared(index: int) -> list[Report] | str:
    try:
        job = _shared_jobs[index]
        return [_triton(job) if isinstance(job.item, Specialization) else _cupy(job)]
    except (InspectionError, BuildError) as error:
        return str(error)


def _triton(job: _Job) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    item: Specialization = job.item
    kernel = item.kernel
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn  # autotune and heuristics wrap it
    types = {
        name: "constexpr" if name in item.constexprs else item.signature.get(name)
        for name in kernel.arg_names
    }
    unknown = sorted({*item.signature, *item.constexprs} - set(types))
    missing = [name for name, kind in types.items() if kind is None]
    if unknown or missing:
        raise InspectionError(
            f"{_path_of(kernel)}:{_line_of_def(kernel)}: the specialization {item.label!r} of "
            f"{kernel.__name__} lacks {', '.join(missing) or 'nothing'}, and names "
            f"{', '.join(unknown) or 'nothing'} that is no argument"
        )
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in item.aligned
    }
    try:
        compiled = triton.compile(
            ASTSource(kernel, types, item.constexprs, attributes),
            target=GPUTarget("cuda", int(_number(job.architecture)), 32),
            options={"num_warps": item.num_warps, "num_stages": item.num_stages},
        )
    except Exception as error:
        raise InspectionError(explain(error, kernel)) from error
    metadata = compiled.metadata
    (code,) = (one for one in _disassembled(compiled.asm["cubin"]) if one.kernel == metadata.name)
    (entry,) = (one for one in ptx.entries(compiled.asm["ptx"]) if one.name == metadata.name)
    name = kernel.__name__ + (f" ({item.label})" if item.label else "")
    # Triton's kernels have no arrays of their own in local memory: what is in it was spilled.
    return _report(
        code, job.backend, kernel=name, architecture=job.architecture, spills=code.local,
        shared=metadata.shared, ptx=entry.instructions, threads=entry.threads, dynamic=False,
    )  # fmt: skip


def _cupy(job: _Job) -> Report:
    label, kernel = job.item
    path = job.backend.operation.folder / f"{job.backend.name}.py"
    return raw_kernel(kernel, job.architecture, label, path, job.backend)


def raw_kernel(
    kernel: Any,
    architecture: str,
    label: str = "",
    path: Path | None = None,
    backend: Backend | None = None,
) -> Report:
    """What CuPy's compiler makes of one ``cupy.RawKernel``; needs no GPU.

    Args:
        path: the file of its source, for the compiler's messages.
        backend: whose kernel it is, for the report.

    Raises:
        InspectionError: it does not compile.
    """
    label = label or kernel.name
    # So that the compiler's messages name the line of the Python file.
    line = _line_of(path, kernel.code) if path is not None else None
    source = f'#line {line} "{path}"\n{kernel.code}' if line else kernel.code
    file = str(path or f"{kernel.name}.cu")
    try:
        cubin, text, log = _compiled_by_cupy(kernel, source, file, _number(architecture))
    except Exception as error:
        message = str(error).strip("\0\n ")
        raise InspectionError(f"CuPy cannot compile {file} ({label}):\n{message}") from None
    entries = {entry.name: entry for entry in ptx.entries(text)}
    if kernel.name not in entries:
        names = ", ".join(entries) or "none"
        raise InspectionError(
            f"{file}: its source has no kernel {kernel.name!r} but {names} "
            '(is it `extern "C" __global__`?)'
        )
    (code,) = (code for code in _disassembled(cubin) if code.kernel == kernel.name)
    (known,) = (one for one in ptx.parse_ptxas(log) if one.name == kernel.name)
    entry = entries[kernel.name]
    return _report(
        code, backend, kernel=label, architecture=architecture,
        spills=known.spill_stores + known.spill_loads, loss=known.loss,
        ptx=entry.instructions, threads=entry.threads, dynamic=entry.dynamic,
    )  # fmt: skip


def _compiled_by_cupy(kernel: Any, source: str, file: str, number: str) -> tuple[bytes, str, str]:
    """Cubin, PTX and log of ``source``, compiled as CuPy compiles this kernel when it is launched.

    All of it is CuPy's own code: only its question for the GPU's architecture is answered here, and
    the cubin is taken instead of loaded into the GPU.
    """
    from unittest.mock import patch

    from cupy._core import core
    from cupy.cuda import compiler, function
    from cupy_backends.cuda.libs import nvrtc

    class Program(compiler._NVRTCProgram):
        def __init__(self, source: str, name: str = "", *others: Any, **more: Any) -> None:
            super().__init__(source, file, *others, **more)

        def compile(self, options: tuple[str, ...] = (), log_stream: Any = None) -> Any:
            # What comes from NVRTC's cache comes without ptxas's report. CUDA 12.8's has no cache.
            more = ("--no-cache",) if nvrtc.getVersion() >= (13, 0) else ()
            compiled = super().compile((*options, *more), log_stream)
            text = nvrtc.getPTX(self.ptr)
            (folder / "kernel.ptx").write_bytes(text.encode() if isinstance(text, str) else text)
            return compiled

    class Module(function.Module):
        def load(self, code: bytes) -> None:
            # CuPy's getCUBIN takes the last byte, a zero, for the end of a string.
            loaded.append(code + b"\0")

    def target(_: object) -> tuple[str, str]:
        return f"-arch=sm_{number}", "cubin"

    loaded: list[bytes] = []
    log = io.StringIO()
    state = kernel.__getstate__()
    with tempfile.TemporaryDirectory() as name, patch.object(function, "Module", Module):
        folder = Path(name)
        more = ["--ptxas-options=-v"]
        if state["backend"] == "nvcc":
            more += ["--keep", f"--keep-dir={folder}"]  # for its PTX
        with patch.multiple(
            compiler,
            _NVRTCProgram=Program,
            _get_arch_for_options_for_nvrtc=target,
            _kernel_cache_backend=compiler._DiskKernelCacheBackend(name),
        ):
            core.compile_with_cache(
                source,
                (*state["options"], *more),
                arch=number,
                prepend_cupy_headers=False,
                backend=state["backend"],
                translate_cucomplex=state["translate_cucomplex"],
                enable_cooperative_groups=state["enable_cooperative_groups"],
                name_expressions=state["name_expressions"],
                log_stream=log,
                jitify=bool(state["jitify"]),
            )
        (written,) = folder.glob("*.ptx")
        return loaded[0], written.read_text(), log.getvalue()


def _report(code: assembly.Code, backend: Backend | None, **figures: Any) -> Report:
    """The report on a function; ``figures`` add to what its machine code says, or replace it."""
    names: dict[str, Any] = {}
    if backend:
        names = {"operation": backend.operation.name, "backend": backend.name}
    return Report(**vars(code) | names | figures)


def _raw_kernels(module: ModuleType) -> list[tuple[str, Any]]:
    """Every RawKernel of a module with a label, each compilation once."""
    import cupy

    found: dict[str, tuple[str, Any]] = {}

    def add(label: str, value: Any) -> None:
        if isinstance(value, cupy.RawKernel):
            # All that CuPy compiles it from.
            found.setdefault(repr(value.__getstate__()), (f"{value.name}{label}", value))
        elif isinstance(value, dict):
            for key, item in value.items():
                add(f" [{_key_text(key)}]", item)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                add(f" [{index}]", item)

    for value in list(vars(module).values()):
        add("", value)
    return list(found.values())


def _key_text(key: Any) -> str:
    parts = key if isinstance(key, tuple) else (key,)
    return ", ".join(str(part).removeprefix("torch.") for part in parts)


def _disassembled(cubin: bytes) -> list[assembly.Code]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return assembly.read(Path(file.name))


def _line_of(path: Path, code: str) -> int | None:
    """The line of the file at which ``code`` begins; None if it was put together."""
    text = path.read_text()
    start = text.find(code)
    return text.count("\n", 0, start) + 1 if start >= 0 and code else None


def _number(architecture: str) -> str:
    return re.sub(r"\D", "", architecture)


def _path_of(kernel: Any) -> str:
    return str(kernel.fn.__code__.co_filename)


def _line_of_def(kernel: Any) -> int:
    """Of the word ``def``, from which Triton counts: decorators come before it."""
    lines = enumerate(kernel.raw_src)
    decorators = next((index for index, line in lines if line.lstrip().startswith("def ")), 0)
    return int(kernel.starting_line_number) + decorators


def _import(backend: Backend) -> ModuleType:
    try:
        return importlib.import_module(f"custom_kernels.{backend}")
    except Exception as error:
        raise InspectionError(explain(error)) from error


def explain(error: BaseException, kernel: Any = None) -> str:
    """The message of an error, with the file and line in this package that it comes from.

    Triton counts lines from the start of the function; they are turned into the file's.
    """
    if isinstance(error, (InspectionError, BuildError)):
        return str(error)
    if isinstance(error, SyntaxError):
        return "".join(traceback.format_exception_only(error)).strip()
    chain = [error]
    while cause := (chain[-1].__cause__ or chain[-1].__context__):
        chain.append(cause)
    for inner in reversed(chain):
        node: Any = getattr(inner, "node", None)
        source = getattr(inner, "src", None)
        if source is not None and hasattr(node, "lineno"):
            for function in _functions_like(kernel):
                if function.src == source:
                    line = _line_of_def(function) + node.lineno - 1
                    return f"{_path_of(function)}:{line}: {inner}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).parent.parent == paths.PACKAGE]
    where = f"{ours[-1].filename}:{ours[-1].lineno}: " if ours else ""
    return where + "".join(traceback.format_exception_only(error)).strip()


def _functions_like(kernel: Any) -> list[Any]:
    """The kernel, and every Triton function that its module knows by name."""
    if kernel is None:
        return []
    others = kernel.fn.__globals__.values()
    return [kernel, *(one for one in others if hasattr(one, "starting_line_number"))]
