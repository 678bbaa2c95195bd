# SPDX-License-Identifier: Apache-2.0
"""What the compilers make of every kernel, for GPUs that need not be there.

``python -m custom_kernels.inspection gemm.triton`` compiles every kernel of a backend for every
pinned architecture and prints registers, spills, shared memory, occupancy, code size, tensor-core
instructions and the widest access to global memory.

- CUDA C++: what ``build`` compiled.
- Triton: the backend's ``specializations()``, compiled as a launch would.
- CuPy: every ``RawKernel`` that the backend's module holds (by itself, or in a dict, list or
  tuple), by CuPy's own code, with the options and headers of a launch. CuPy compiles for ``sm_90``
  where the others compile for ``sm_90a``, so its kernels have no wgmma.

Comments at the start of a line say what is known about a file (``//`` in a ``.cu``, ``#`` in a
``.py``): ``architectures: 9.0a``, the only ones it is written for; ``spills: <reason>``,
``no tensor cores: <reason>`` and ``not deterministic: <reason>``, where that is on purpose. An
operation is a matrix product if its ``__init__.py`` says ``MATRIX = True``.

Reports are kept in the cache folder under the hash of all that they depend on, so that asking a
second time takes a fraction of a second.
"""

import argparse
import ast
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from custom_kernels import assembly, build, registry

MULTIPLYING = frozenset({"cublas", "cublasLt", "cusparse", "cusparseLt"})
"""Libraries that multiply matrices on tensor cores."""
KEPT_REPORTS = 500
"""Reports that stay in the cache."""
_NOTES = re.compile(
    r"^(?://|#) (architectures|spills|no tensor cores|not deterministic): *(.+)$", re.MULTILINE
)
_VERSIONS = (
    *("triton", "cupy-cuda13x", "cupy-cuda12x"),
    *("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "torch"),
)


@dataclass(frozen=True)
class Specialization:
    """One variant of a Triton kernel, as a launch on a GPU would compile it.

    A Triton backend lists its own in ``specializations()``, made by the function with which the
    launch chooses its constants, so that the two cannot drift apart.
    """

    kernel: Any
    """The function under ``@triton.jit``."""
    signature: dict[str, str]
    """The type of each argument that is not a constant: ``{"x": "*bf16", "rows": "i32"}``."""
    constexprs: dict[str, Any] = field(default_factory=dict)
    """The value of each ``tl.constexpr`` argument."""
    num_warps: int = 4
    num_stages: int = 3
    label: str = ""
    """What tells it from the kernel's other variants, for example ``"M <= 16"``."""
    aligned: tuple[str, ...] = ()
    """Pointers and integers that a launch finds to be multiples of 16."""
    architectures: tuple[str, ...] = ()
    """The only ones on which it is launched; empty: all."""


@dataclass(frozen=True)
class Report:
    """One kernel on one architecture. Sizes are in bytes; registers, stack and spills per thread,
    shared memory per block."""

    operation: str
    backend: str
    kernel: str
    architecture: str
    registers: int
    stack: int
    spills: int
    local: int
    """What its instructions move to and from local memory, spills included, each counted once."""
    shared: int
    dynamic: bool
    """Whether the launch adds shared memory, so that ``shared`` is not all of it."""
    threads: int | None
    """Per block, where the compiler knows."""
    ptx: int | None
    """Instructions of its PTX."""
    sass: int
    """Size of its machine code."""
    tensor: dict[str, int]
    """How often each tensor-core instruction stands in it; sparse forms end in ``.SP``."""
    load: str
    """The widest load from global memory."""
    store: str

    @property
    def occupancy(self) -> assembly.Occupancy | None:
        """None where the threads per block are not known, or the architecture is not."""
        if self.threads is None:
            return None
        return assembly.occupancy(self.architecture, self.threads, self.registers, self.shared)


class InspectionError(RuntimeError):
    """A kernel cannot be compiled. The message holds the compiler's own words, with file and
    line."""


def nvrtc_includes() -> tuple[str, ...]:
    """Options that name all folders of CUDA's headers, for the ``options`` of a ``cupy.RawKernel``.

    CuPy itself names the CUDA runtime's folder. The packages of CUDA 12 have one per component, and
    ``mma.h`` needs two.
    """
    return tuple(f"-I{folder}" for folder in build.include_folders())


def notes(operation: str, backend: str) -> dict[str, str]:
    """What the backend's files say of themselves: ``architectures``, ``spills``, ``no tensor
    cores``."""
    found: dict[str, str] = {}
    for suffix in (".py", ".cu"):
        path = build.PACKAGE / operation / f"{backend}{suffix}"
        if path.is_file():
            found.update(_NOTES.findall(path.read_text()))
    return found


def architectures(operation: str, backend: str, wanted: Iterable[str]) -> tuple[str, ...]:
    """Those of ``wanted`` that the backend is written for."""
    only = notes(operation, backend).get("architectures", "").split()
    return tuple(name for name in wanted if not only or name in only)


def is_matrix(operation: str) -> bool:
    """Whether the operation is a matrix product, which tensor cores should do."""
    text = (build.PACKAGE / operation / "__init__.py").read_text()
    return re.search(r"^MATRIX = True$", text, re.MULTILINE) is not None


def inspect(
    operation: str, backend: str, wanted: Sequence[str] | None = None, keep: bool = True
) -> list[Report]:
    """Every kernel of a backend on every architecture of ``wanted`` (default: the pinned ones) that
    it is written for; none for a backend that has no kernels of its own.

    Compiles what was not compiled yet, in processes of their own: nothing is imported here.

    Raises InspectionError or build.BuildError if a kernel does not compile.
    """
    names = architectures(operation, backend, wanted or build.pinned_architectures())
    if registry.kind(operation, backend) == "torch" or not names:
        return []
    paths = {name: _cached(operation, backend, name) for name in names}
    missing = [name for name in names if not (keep and paths[name].is_file())]
    made = _in_own_process(operation, backend, missing) if missing else {}
    for name, reports in made.items():
        _write(paths[name], reports)
    return [
        report for name in names for report in (made[name] if name in made else _read(paths[name]))
    ]


def warnings(reports: Sequence[Report]) -> list[str]:
    """What is wrong with the kernels of one backend, unless its file says that it is on purpose."""
    found = []
    for report in reports:
        said = notes(report.operation, report.backend)
        where = f"{report.operation}.{report.backend}: {report.kernel} on {report.architecture}"
        if report.spills and "spills" not in said:
            found.append(f"{where} spills {report.spills} bytes")
        elif report.local and not report.spills and "spills" not in said:
            found.append(f"{where} uses local memory ({report.local} bytes, {report.stack} stack)")
    for operation, backend in dict.fromkeys((item.operation, item.backend) for item in reports):
        if not is_matrix(operation) or "no tensor cores" in notes(operation, backend):
            continue
        source = build.find(operation, backend)
        if source is not None and MULTIPLYING & set(source.libraries()):
            continue  # the library multiplies; what is compiled here prepares and finishes
        own = [item for item in reports if (item.operation, item.backend) == (operation, backend)]
        for name in dict.fromkeys(report.architecture for report in own):
            if not any(report.tensor for report in own if report.architecture == name):
                found.append(
                    f"{operation}.{backend} multiplies matrices without tensor-core instructions "
                    f"on {name}"
                )
    return found


# --- compiling, in this process -------------------------------------------------------------------


def compile_here(
    operation: str, backend: str, names: Sequence[str], most: int | None = None
) -> list[Report]:
    """The same as ``inspect`` without cache and without a process of its own; of a Triton backend
    with many specializations ``most`` of them, some of each kernel.

    A Triton backend must have been imported without Triton's interpreter.
    """
    kind = registry.kind(operation, backend)
    if kind == "cuda":
        return _cuda(operation, backend, names)
    if kind == "torch":
        return []
    jobs = list(_jobs(operation, backend, kind, names))
    return _run_jobs(_some(jobs, most) if most and len(jobs) > most else jobs)


def _cuda(operation: str, backend: str, names: Sequence[str]) -> list[Report]:
    source = build.find(operation, backend)
    assert source is not None
    pinned = build.pinned_architectures()
    # One library holds all pinned architectures; what is compiled already is not compiled again.
    whole = set(names) <= set(pinned) and build.library_path(source, pinned).is_file()
    built = build.build(source, pinned if whole else names)
    reports = []
    for name in names:
        said = {kernel.name: kernel for kernel in built.kernels if kernel.architecture == name}
        if not said:
            continue
        codes = assembly.read(built.path, name)
        for kernel, code in zip(
            assembly.demangle([code.name for code in codes]), codes, strict=True
        ):
            if kernel in said:
                known = said[kernel]
                spills = known.spill_stores + known.spill_loads
                reports.append(
                    _report(operation, backend, kernel, name, code, spills, known.shared)
                    | {"ptx": known.ptx, "threads": known.threads, "dynamic": known.dynamic}
                )
    return [Report(**report) for report in reports]


@dataclass(frozen=True)
class _Job:
    """One compilation: a Triton specialization, or a RawKernel with its label."""

    operation: str
    backend: str
    architecture: str
    item: Any


def _jobs(operation: str, backend: str, kind: str, names: Sequence[str]) -> Iterator[_Job]:
    module = _import(operation, backend)
    items: Sequence[Any]
    if kind == "triton":
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
                yield _Job(operation, backend, name, item)


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
    """All of them, in parallel. Raises InspectionError with the messages of all that failed."""
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
    # What the compiler says is mostly the same for every dtype and architecture: show it once.
    errors = {error.partition("\n")[2] or error: error for error in found if isinstance(error, str)}
    if errors:
        raise InspectionError("\n\n".join(errors.values()))
    return [report for one in found if not isinstance(one, str) for report in one]


_shared_jobs: list[_Job] = []


def _run_shared(index: int) -> list[Report] | str:
    try:
        return _run_job(_shared_jobs[index])
    except (InspectionError, build.BuildError) as error:
        return str(error)


def _run_job(job: _Job) -> list[Report]:
    run = _triton if isinstance(job.item, Specialization) else _cupy
    return [Report(**report) for report in run(job)]


def _triton(job: _Job) -> list[dict[str, Any]]:
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
    unknown = ", ".join(sorted({*item.signature, *item.constexprs} - set(types))) or "nothing"
    missing = ", ".join(name for name, kind in types.items() if kind is None) or "nothing"
    if (unknown, missing) != ("nothing", "nothing"):
        raise InspectionError(
            f"{_place(kernel)}: the specialization {item.label!r} of {kernel.__name__} lacks "
            f"{missing}, and names {unknown} that is no argument"
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
    (code,) = (
        code for code in _disassembled(compiled.asm["cubin"]) if code.name == compiled.metadata.name
    )
    (entry,) = (
        entry
        for entry in assembly.entries(compiled.asm["ptx"])
        if entry.name == compiled.metadata.name
    )
    name = f"{kernel.__name__}" + (f" ({item.label})" if item.label else "")
    # Triton's kernels have no arrays of their own in local memory: what is there was spilled.
    shared = compiled.metadata.shared
    report = _report(job.operation, job.backend, name, job.architecture, code, code.local, shared)
    return [report | {"ptx": entry.instructions, "threads": entry.threads, "dynamic": False}]


def raw_kernel(kernel: Any, architecture: str, label: str = "", path: Path | None = None) -> Report:
    """What CuPy's compiler makes of one ``cupy.RawKernel``; needs no GPU.

    ``path`` is the file in which its source stands, for the compiler's messages. Raises
    InspectionError if it does not compile.
    """
    return Report(**_raw_kernel(kernel, architecture, label or kernel.name, path))


def _cupy(job: _Job) -> list[dict[str, Any]]:
    label, kernel = job.item
    path = build.PACKAGE / job.operation / f"{job.backend}.py"
    report = _raw_kernel(kernel, job.architecture, label, path)
    return [report | {"operation": job.operation, "backend": job.backend}]


def _raw_kernel(kernel: Any, architecture: str, label: str, path: Path | None) -> dict[str, Any]:
    # So that the compiler's messages name the line of the Python file in which it stands.
    line = _line_of(path, kernel.code) if path is not None else None
    source = f'#line {line} "{path}"\n{kernel.code}' if line else kernel.code
    file = str(path or f"{kernel.name}.cu")
    try:
        cubin, ptx, log = _compiled_by_cupy(kernel, source, file, _number(architecture))
    except Exception as error:
        message = str(error).strip("\0\n ")
        raise InspectionError(f"CuPy cannot compile {file} ({label}):\n{message}") from None
    said = {entry.name: entry for entry in assembly.entries(ptx)}
    if kernel.name not in said:
        names = ", ".join(said) or "none"
        raise InspectionError(
            f"{file}: its source has no kernel {kernel.name!r}; there is {names} "
            '(is it `extern "C" __global__`?)'
        )
    (code,) = (code for code in _disassembled(cubin) if code.name == kernel.name)
    spilled = {one.name: one.spill_stores + one.spill_loads for one in build.parse_ptxas(log)}
    entry = said[kernel.name]
    report = _report("", "", label, architecture, code, spilled[kernel.name], code.shared)
    return report | {"ptx": entry.instructions, "threads": entry.threads, "dynamic": entry.dynamic}


def _compiled_by_cupy(kernel: Any, source: str, file: str, number: str) -> tuple[bytes, str, str]:
    """Cubin, PTX and log of ``source``, compiled as CuPy compiles this kernel when it is launched.

    All of it is CuPy's own code: what it asks the GPU (the architecture) is answered here, and what
    it would load into the GPU is taken.
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
            _get_arch_for_options_for_nvrtc=lambda _: (f"-arch=sm_{number}", "cubin"),
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
        (ptx,) = folder.glob("*.ptx")
        return loaded[0], ptx.read_text(), log.getvalue()


def _report(
    operation: str,
    backend: str,
    kernel: str,
    architecture: str,
    code: assembly.Code,
    spills: int,
    shared: int,
) -> dict[str, Any]:
    found = asdict(code)
    del found["name"]
    found["sass"] = found.pop("bytes")
    return found | {
        "operation": operation,
        "backend": backend,
        "kernel": kernel,
        "architecture": architecture,
        "spills": spills,
        "shared": shared,
    }


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
    """The line at which ``code`` stands in the file, None if it was put together."""
    text = path.read_text()
    start = text.find(code)
    return text.count("\n", 0, start) + 1 if start >= 0 and code else None


def _number(architecture: str) -> str:
    return re.sub(r"\D", "", architecture)


def _place(kernel: Any) -> str:
    return f"{kernel.fn.__code__.co_filename}:{_line_of_def(kernel)}"


def _line_of_def(kernel: Any) -> int:
    """Of the word ``def``, from which Triton counts: decorators stand before it."""
    lines = enumerate(kernel.raw_src)
    decorators = next((index for index, line in lines if line.lstrip().startswith("def ")), 0)
    return int(kernel.starting_line_number) + decorators


def _import(operation: str, backend: str) -> ModuleType:
    try:
        return importlib.import_module(f"custom_kernels.{operation}.{backend}")
    except Exception as error:
        raise InspectionError(explain(error)) from error


def explain(error: BaseException, kernel: Any = None) -> str:
    """What an error says, with the file and line in this package that it comes from.

    Triton counts lines from the start of the function; they are turned into the file's.
    """
    if isinstance(error, (InspectionError, build.BuildError)):
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
                    path = function.fn.__code__.co_filename
                    line = _line_of_def(function) + node.lineno - 1
                    return f"{path}:{line}: {inner}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).parent.parent == build.PACKAGE]
    where = f"{ours[-1].filename}:{ours[-1].lineno}: " if ours else ""
    return where + "".join(traceback.format_exception_only(error)).strip()


def _functions_like(kernel: Any) -> list[Any]:
    """The kernel, and every Triton function that its module knows by name."""
    if kernel is None:
        return []
    return [
        kernel,
        *(
            value
            for value in kernel.fn.__globals__.values()
            if hasattr(value, "starting_line_number")
        ),
    ]


# --- in processes of their own, and kept ----------------------------------------------------------


def _in_own_process(operation: str, backend: str, names: Sequence[str]) -> dict[str, list[Report]]:
    """compile_here in a process that is not in Triton's interpreter, whatever this one is in."""
    if registry.kind(operation, backend) == "cuda":
        reports = _cuda(operation, backend, names)
    else:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [
            sys.executable,
            "-c",
            "from custom_kernels import inspection; inspection._serve()",
        ]
        folder = str(build.PACKAGE.parent)
        environment["PYTHONPATH"] = os.pathsep.join(
            [folder, *filter(None, [environment.get("PYTHONPATH")])]
        )
        result = subprocess.run(
            command,
            input=json.dumps([operation, backend, list(names)]),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        answer = result.stdout.rpartition("\n\0")[2]
        if result.returncode != 0 or not answer:
            raise InspectionError(
                f"compiling {operation}.{backend} ended with status {result.returncode}:\n"
                f"{(result.stdout + result.stderr).strip()}"
            )
        found = json.loads(answer)
        if "error" in found:
            raise InspectionError(found["error"])
        reports = [Report(**report) for report in found["reports"]]
    return {name: [one for one in reports if one.architecture == name] for name in names}


def _serve() -> None:
    """Answer one request on standard input."""
    operation, backend, names = json.load(sys.stdin)
    answer: dict[str, Any]
    try:
        answer = {"reports": [asdict(one) for one in compile_here(operation, backend, names)]}
    except InspectionError as error:
        answer = {"error": str(error)}
    # Compilers print: the answer is what follows the mark.
    print("\n\0" + json.dumps(answer))


def fingerprint(operation: str, backend: str) -> str:
    """A hash of all files of this package that the backend is made of."""
    digest = hashlib.sha256()
    source = build.find(operation, backend)
    compiled = source.files() if source is not None else []
    for path in sorted({*_closure(operation, backend), *compiled}):
        digest.update(f"{path.relative_to(build.PACKAGE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _cached(operation: str, backend: str, architecture: str) -> Path:
    made_of = f"{operation}.{backend} {architecture} {fingerprint(operation, backend)}\0"
    digest = hashlib.sha256(made_of.encode())
    source = build.find(operation, backend)
    if source is not None:
        digest.update(build.library_path(source, (architecture,)).name.encode())
    for name in _VERSIONS:
        try:
            digest.update(f"{name} {importlib.metadata.version(name)}\0".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    return (
        build.cache_dir() / "inspections" / f"{operation}.{backend}-{digest.hexdigest()[:20]}.json"
    )


def _closure(operation: str, backend: str) -> set[Path]:
    """The backend's Python file, all files of this package that it imports, directly or not, and
    the data beside it."""
    found = {Path(__file__), Path(assembly.__file__)}
    queue = [build.PACKAGE / operation / f"{backend}.py"]
    while queue:
        path = queue.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        try:
            tree = ast.parse(path.read_text())
        except SyntaxError:
            continue  # the compilation will say so
        for node in ast.walk(tree):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for module in modules:
                first, *rest = module.split(".")
                if first == build.PACKAGE.name:
                    base = build.PACKAGE.joinpath(*rest)
                    queue += [base.with_suffix(".py"), base / "__init__.py"]
    return found | set((build.PACKAGE / operation).glob("*/*.json"))


def _read(path: Path) -> list[Report]:
    return [Report(**report) for report in json.loads(path.read_text())]


def _write(path: Path, reports: Sequence[Report]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump([asdict(report) for report in reports], file)
    os.replace(file.name, path)
    kept = sorted(path.parent.glob("*.json"), key=lambda found: found.stat().st_mtime)
    for old in kept[:-KEPT_REPORTS]:
        old.unlink(missing_ok=True)


# --- the command ----------------------------------------------------------------------------------


def table(reports: Sequence[Report]) -> Any:
    """All reports as a Rich table."""
    from rich.markup import escape
    from rich.table import Table

    found = Table(header_style="bold")
    found.add_column("kernel", overflow="fold", min_width=20)
    for name in (
        "arch",
        "regs",
        "spills",
        "stack",
        "shared",
        "threads",
        "occupancy",
        "PTX",
        "SASS",
    ):
        found.add_column(name, justify="right", no_wrap=True)
    for name in ("tensor cores", "load", "store"):
        found.add_column(name, overflow="fold")
    before = None
    for report in sorted(reports, key=lambda one: (one.operation, one.backend, one.kernel)):
        backend = f"{report.operation}.{report.backend}: " if report.operation else ""
        name = f"{backend}{short(report.kernel)}"
        found.add_row("" if name == before else escape(name), *cells(report))
        before = name
    return found


def cells(report: Report) -> list[str]:
    """One report as the table shows it."""
    occupancy = report.occupancy
    tensor = " ".join(f"{name} x{count}" for name, count in sorted(report.tensor.items()))
    return [
        report.architecture,
        str(report.registers),
        f"[red]{report.spills}[/]" if report.spills else "0",
        str(report.stack),
        f"{report.shared}{' + dynamic' if report.dynamic else ''}",
        "?" if report.threads is None else str(report.threads),
        "?" if occupancy is None else f"{'≤ ' if report.dynamic else ''}{occupancy.share:.0%}",
        "?" if report.ptx is None else str(report.ptx),
        f"{report.sass / 1024:.1f} K",
        tensor or "-",
        report.load or "-",
        report.store or "-",
    ]


def short(kernel: str, width: int = 60) -> str:
    """A C++ name without namespaces that everybody knows, cut in its middle."""
    kernel = (
        kernel.replace("(anonymous namespace)::", "").replace("cutlass::", "").removeprefix("void ")
    )
    return kernel if len(kernel) <= width else f"{kernel[: width - 21]}…{kernel[-20:]}"


def chosen(words: Sequence[str]) -> list[tuple[str, str]]:
    """``gemm`` and ``gemm.triton`` as (operation, backend) with kernels; nothing means everything.

    Raises registry.BackendError for what does not exist.
    """
    found = []
    for word in words or registry.operations():
        operation, _, backend = word.partition(".")
        if operation not in registry.operations():
            known = ", ".join(registry.operations())
            raise registry.BackendError(f"there is no operation {operation!r}; there are: {known}")
        names = registry.backend_files(operation)
        if backend and backend not in names:
            raise registry.BackendError(
                f"{operation} has no backend {backend!r}; there are: {', '.join(sorted(names))}"
            )
        found += [(operation, name) for name in ([backend] if backend else sorted(names))]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, compile, print. Returns the exit status: 1 if a kernel does not
    compile; warnings do not count."""
    parser = argparse.ArgumentParser(
        prog="python -m custom_kernels.inspection",
        description="Registers, spills, shared memory, occupancy and instructions of every kernel.",
    )
    parser.add_argument("kernel", nargs="*", help="an operation, or operation.backend; default all")
    parser.add_argument("--arch", action="append", help="for example 9.0a; repeatable")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    options = parser.parse_args(arguments)
    wanted = [name for words in options.arch or [] for name in words.replace(",", " ").split()]
    wrong = [name for name in wanted if not re.fullmatch(r"\d+\.\d[a-z]?", name)]
    if wrong:
        print(f"error: {wrong[0]!r} is not an architecture; write 9.0a", file=sys.stderr)
        return 1

    reports: list[Report] = []
    errors: dict[str, str] = {}
    nothing: list[str] = []
    try:
        backends = chosen(options.kernel)
    except registry.BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for operation, backend in backends:
        try:
            found = inspect(operation, backend, wanted or None)
        except (InspectionError, build.BuildError) as error:
            errors[f"{operation}.{backend}"] = str(error)
            continue
        reports += found
        if not found:
            nothing.append(_why_nothing(operation, backend, wanted))
    if options.json:
        document = {
            "reports": [
                asdict(one) | {"occupancy": asdict(one.occupancy) if one.occupancy else None}
                for one in reports
            ],
            "warnings": warnings(reports),
            "errors": errors,
        }
        print(json.dumps(document, indent=1))
        return 1 if errors else 0

    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    if reports:
        console.print(table(reports))
        console.print(
            "registers, stack and spills per thread, shared memory per block, in bytes; occupancy: "
            "warps of a multiprocessor; PTX: instructions; load and store: the widest to global "
            "memory"
        )
    for line in nothing:
        console.print(line, markup=False)
    for operation, backend in dict.fromkeys((one.operation, one.backend) for one in reports):
        for what, reason in notes(operation, backend).items():
            if what != "architectures":
                console.print(f"{operation}.{backend}: {what}: {reason}", markup=False)
    for line in warnings(reports):
        console.print(f"warning: {line}", style="yellow", markup=False)
    for message in errors.values():
        print(f"error: {message}", file=sys.stderr)
    return 1 if errors else 0


def _why_nothing(operation: str, backend: str, wanted: Sequence[str]) -> str:
    if registry.kind(operation, backend) == "torch":
        return f"{operation}.{backend}: torch's own kernels, nothing to inspect"
    if not architectures(operation, backend, wanted or build.pinned_architectures()):
        return f"{operation}.{backend}: not written for {', '.join(wanted)}"
    return f"{operation}.{backend}: has no kernels of its own"


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # who reads our output may stop: `| head`
    # Under its own name, so that a backend's Specialization is the one known here.
    sys.exit(importlib.import_module("custom_kernels.inspection").main())
