# SPDX-License-Identifier: Apache-2.0
"""Read PTX, and ptxas's report of registers, shared memory and spills."""

import itertools
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    """Resources of one kernel on one architecture: registers, and bytes per thread or block."""

    name: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    ptx: int | None = None
    """Number of PTX instructions."""
    threads: int | None = None
    """Threads in a block, where ``__launch_bounds__`` fixes it."""
    dynamic: bool = False
    """Whether it uses shared memory whose size the launch chooses, beyond ``shared``."""
    loss: str = ""
    """What ptxas warns of as a loss of performance: of wgmma instructions that wait for each other,
    say. Empty: nothing."""


# --- ptxas ----------------------------------------------------------------------

_COMPILING = re.compile(r"Compiling entry function '(?P<name>[^']+)' for 'sm_(?P<sm>\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_LOSS = re.compile(r"Potential Performance Loss: (?P<what>.+?) in the function '(?P<name>[^']+)'")


def kernels(log: str, kept: Path) -> list[Kernel]:
    """The kernels in ptxas's ``log``, with what the PTX files in the folder ``kept`` add."""
    written = {}
    for path in kept.glob("*.ptx"):
        text = path.read_text()
        if target := re.search(r"^\.target sm_(\w+)", text, re.MULTILINE):
            for entry in entries(text):
                written[entry.name, _architecture_name(target[1])] = entry
    found = parse_ptxas(log)
    for index, kernel in enumerate(found):
        if in_ptx := written.get((kernel.name, kernel.architecture)):
            found[index] = replace(
                kernel, ptx=in_ptx.instructions, threads=in_ptx.threads, dynamic=in_ptx.dynamic
            )
    names = demangle([kernel.name for kernel in found])
    return [replace(kernel, name=name) for kernel, name in zip(found, names, strict=True)]


def _architecture_name(sm: str) -> str:
    number = re.fullmatch(r"(\d+)(\d)(\w?)", sm)
    return f"{number[1]}.{number[2]}{number[3]}" if number else sm


def parse_ptxas(text: str) -> list[Kernel]:
    """Read ``ptxas -v``: an entry line, a line on stack and spills, a line on registers and shared
    memory."""
    kernels: list[Kernel] = []
    losses = {match["name"]: " ".join(match["what"].split()) for match in _LOSS.finditer(text)}
    entry: dict[str, str] | None = None
    memory = (0, 0, 0)
    for line in text.splitlines():
        if match := _COMPILING.search(line):
            entry = match.groupdict()
        elif match := _SPILLS.search(line):
            memory = (int(match[1]), int(match[2]), int(match[3]))
        elif entry is not None and (match := _USED.search(line)):
            shared = _SHARED.search(line)
            kernels.append(
                Kernel(
                    entry["name"],
                    _architecture_name(entry["sm"]),
                    int(match["registers"]),
                    *memory,
                    int(shared[1]) if shared else 0,
                    loss=losses.get(entry["name"], ""),
                )
            )
            entry = None
    return kernels


# --- PTX ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One kernel in PTX."""

    name: str
    instructions: int
    threads: int | None
    """Per block, as ``__launch_bounds__`` or the compiler fixes it."""
    dynamic: bool
    """Whether it uses shared memory whose size the launch chooses."""


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_FUNCTION = re.compile(r"^(?:\.\w+\s+)*\.(?:entry|func)\b", re.MULTILINE)
_THREADS = re.compile(r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")
_DYNAMIC = re.compile(r"^\.extern\s+\.shared\b.*?([\w$]+)\s*(?:\[\])?;", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+\s+)?[a-z][\w.:]*(?:\s[^;]*)?;", re.MULTILINE)


def entries(ptx: str) -> list[Entry]:
    """The kernels of a PTX text, in its order."""
    dynamic = _DYNAMIC.findall(ptx)
    starts = [match.start() for match in _FUNCTION.finditer(ptx)] + [len(ptx)]
    found = []
    for start, end in itertools.pairwise(starts):
        text = ptx[start:end]
        name = _ENTRY.match(text[text.find(".entry") :]) if ".entry" in text else None
        if name is None:
            continue
        threads = _THREADS.search(text)
        body = text[text.find("{") :]
        found.append(
            Entry(
                name=name[1],
                instructions=len(_INSTRUCTION.findall(body)),
                threads=math.prod(int(n) for n in threads.groups() if n) if threads else None,
                dynamic=any(re.search(rf"\b{re.escape(symbol)}\b", body) for symbol in dynamic),
            )
        )
    return found


def demangle(names: Sequence[str]) -> list[str]:
    """C++ names without their parameters; unchanged without c++filt."""
    filt = shutil.which("c++filt")
    if filt is None or not names:
        return list(names)
    result = subprocess.run(
        [filt, "--no-params"], input="\n".join(names), capture_output=True, text=True, check=False
    )
    found = result.stdout.splitlines()
    return found if len(found) == len(names) else list(names)
