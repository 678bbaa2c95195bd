# SPDX-License-Identifier: Apache-2.0
"""Read machine code (SASS), and compute the occupancy of an SM.

The tool is cuobjdump of the triton package, else the CUDA toolkit's.
"""

import contextlib
import importlib.util
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from custom_kernels.compile import toolchain
from custom_kernels.compile.toolchain import BuildError


@dataclass(frozen=True)
class Limits:
    """The resources of one SM: bytes, and warps of 32 threads."""

    warps: int
    blocks: int
    shared: int
    shared_per_block: int


KIB = 1024
LIMITS = {
    "8.0": Limits(64, 32, 164 * KIB, 163 * KIB),
    "8.6": Limits(48, 16, 100 * KIB, 99 * KIB),
    "8.9": Limits(48, 24, 100 * KIB, 99 * KIB),
    "9.0": Limits(64, 32, 228 * KIB, 227 * KIB),
    "10.0": Limits(64, 32, 228 * KIB, 227 * KIB),
    "10.3": Limits(64, 32, 228 * KIB, 227 * KIB),
    "12.0": Limits(48, 24, 100 * KIB, 99 * KIB),
}
"""By compute capability. Source: CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability"."""
REGISTERS = 64 * KIB
"""32-bit registers of an SM, on every architecture; each of four schedulers has a quarter."""
REGISTER_UNIT = 256
"""Registers are allocated to a warp in multiples of this."""
SHARED_UNIT = 128
SHARED_RESERVED = 1024
"""Bytes of shared memory that CUDA reserves, per block."""


@dataclass(frozen=True)
class Occupancy:
    """How full an SM is with one kernel."""

    blocks: int
    share: float
    """Of the warps that it can hold."""
    limiter: str
    """What runs out first: ``registers``, ``shared memory``, ``threads`` or ``blocks``."""


def occupancy(architecture: str, threads: int, registers: int, shared: int) -> Occupancy | None:
    """Resident blocks of ``threads`` threads with ``registers`` each and ``shared`` bytes.

    None for an architecture that is not in LIMITS. The rules are those of CUDA's
    occupancy calculator (cuda_occupancy.h): warps are spread over four schedulers, each of which
    has a quarter of the registers.
    """
    limits = LIMITS.get(architecture.rstrip("abcdefghijklmnopqrstuvwxyz"))
    if limits is None:
        return None
    warps = max(1, math.ceil(threads / 32))
    per_warp = max(REGISTER_UNIT, _up(registers * 32, REGISTER_UNIT))
    held = {
        "threads": limits.warps // warps,
        "blocks": limits.blocks,
        "shared memory": limits.shared // _up(shared + SHARED_RESERVED, SHARED_UNIT),
        "registers": 4 * (REGISTERS // 4 // per_warp) // warps,
    }
    limiter = min(held, key=lambda name: held[name])
    blocks = held[limiter]
    return Occupancy(blocks, blocks * warps / limits.warps, limiter)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# --- machine code ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Code:
    """One function of a binary. Registers and stack are per thread."""

    kernel: str
    registers: int
    stack: int
    shared: int
    """Bytes that are fixed at compile time, per block."""
    sass: int
    """Bytes of machine code."""
    local: int
    """Bytes that its instructions move to and from local memory, spills included, each counted
    once."""
    tensor: dict[str, int]
    """How often each tensor-core instruction occurs in it; sparse forms end in ``.SP``."""
    load: str
    """The widest load from global memory: ``TMA``, ``bulk``, or the instruction and its bytes."""
    store: str


_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", re.MULTILINE)
_SASS = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)",
    re.MULTILINE,
)
_TENSOR = re.compile(r"(?:UTC)?[A-Z]*MMA\d*")
_WIDTH = re.compile(r"\.(256|128|64|[US]16|[US]8)(?![\w])")


def tool(name: str) -> Path:
    """cuobjdump or nvdisasm: of the triton package, beside nvcc, or on PATH.

    Raises:
        BuildError: it is not installed.
    """
    spec = importlib.util.find_spec("triton")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    found = [folder / "backends" / "nvidia" / "bin" / name for folder in folders]
    with contextlib.suppress(BuildError):
        found.append(toolchain.find().nvcc.parent / name)
    if on_path := shutil.which(name):
        found.append(Path(on_path))
    for path in found:
        if path.is_file():
            return path
    raise BuildError(
        f"{name}, which reads compiled kernels, is not installed: it comes with the package triton "
        "and with the CUDA toolkit; run `make dev`"
    )


def read(binary: Path, architecture: str | None = None) -> list[Code]:
    """Every function in a cubin, or of one architecture in a shared library.

    Raises:
        BuildError: it cannot be read; the message of the tool.
    """
    which = ["-arch", f"sm_{architecture.replace('.', '')}"] if architecture else []
    cuobjdump = str(tool("cuobjdump"))
    with ThreadPoolExecutor() as pool:
        commands = [[cuobjdump, what, *which, str(binary)] for what in ("-res-usage", "-sass")]
        resources, sass = pool.map(_run, commands)
    texts = dict(_functions(sass))
    # From Hopper on the reserved kilobyte is counted with the kernel's own.
    reserved = 0 if _number(sass, architecture) < 90 else SHARED_RESERVED
    return [
        _code(name, int(registers), int(stack), max(0, int(shared) - reserved), texts.get(name, ""))
        for name, registers, stack, shared in _RESOURCES.findall(resources)
    ]


def _number(sass: str, architecture: str | None) -> int:
    """90 for Hopper."""
    if architecture is not None:
        return int(re.sub(r"\D", "", architecture))
    named = re.search(r"code for sm_(\d+)", sass)
    return int(named[1]) if named else 0


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0 or "does not contain device code" in result.stderr:
        raise BuildError(f"the tool `{' '.join(command)}` failed: {result.stderr.strip()}")
    return result.stdout


def _functions(sass: str) -> Iterable[tuple[str, str]]:
    parts = re.split(r"^\s*Function : (\S+)\s*$", sass, flags=re.MULTILINE)
    return zip(parts[1::2], parts[2::2], strict=True)


def _code(kernel: str, registers: int, stack: int, shared: int, text: str) -> Code:
    tensor: Counter[str] = Counter()
    local = end = 0
    loads: dict[int, str] = {}
    stores: dict[int, str] = {}
    for address, instruction in _SASS.findall(text):
        end = int(address, 16) + 16
        operation, _, modifiers = instruction.partition(".")
        if _TENSOR.fullmatch(operation):
            tensor[operation + (".SP" if "SP" in modifiers.split(".") else "")] += 1
        elif operation in ("LDL", "STL"):
            local += _width(instruction)
        elif operation.startswith("UTMALDG"):
            loads[KIB + 1] = "TMA"
        elif operation.startswith(("UTMASTG", "UTMAREDG")):
            stores[KIB + 1] = "TMA"
        elif operation == "UBLKCP":
            # Which way it goes is in its operands' spaces: the destination is named first.
            (loads if modifiers.startswith("S") else stores)[KIB] = "bulk"
        elif operation in ("LDG", "LDGSTS", "LD"):
            loads.setdefault(_width(instruction), operation)
        elif operation in ("STG", "ST", "RED", "REDG", "ATOMG"):
            stores.setdefault(_width(instruction), operation)
    return Code(
        kernel=kernel, registers=registers, stack=stack, shared=shared, sass=end, local=local,
        tensor=dict(tensor), load=_widest(loads), store=_widest(stores),
    )  # fmt: skip


def _width(instruction: str) -> int:
    """Bytes that one thread moves."""
    found = _WIDTH.search(instruction)
    return int(re.sub(r"\D", "", found[1])) // 8 if found else 4


def _widest(found: dict[int, str]) -> str:
    if not found:
        return ""
    width = max(found)
    return found[width] if width >= KIB else f"{found[width]} {width} B"
