# SPDX-License-Identifier: Apache-2.0
"""Why an engine failed, in one line, from the log of its processes.

vLLM's processes write into one log, their lines interleaved and prefixed:

    (Worker_TP0 pid=7) ERROR 11-26 09:54:13 [multiproc_executor.py:9] Traceback (most recent call…
    (EngineCore pid=5) ERROR 11-26 09:54:14 [core.py:9] RuntimeError: … See root cause above.
    RuntimeError: Engine core initialization failed. See root cause above.

An outer process only reports that an inner one failed. So tracebacks are separated by process, and
the first one that reports more than that counts.
"""

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

LONGEST = 300
"""Characters shown of an exception's message."""

_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_PROCESS = re.compile(r"^\(([^()]+ pid=\d+)\) ?")
_RECORD = re.compile(r"^([A-Z]+) \d\d-\d\d \d\d:\d\d:\d\d (\[[^]]*\]) ?")
_RANK = re.compile(r"^\[rank\d+\]: ?")
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?=:|$)")
_TRACEBACK = "Traceback (most recent call last):"
_CAUSED = "The above exception was the direct cause of the following exception:"
_DURING = "During handling of the above exception, another exception occurred:"

_VAGUE = re.compile(
    r"(Engine core|WorkerProc) initialization failed|root cause|EngineDead|"
    r"Worker proc \S+ died unexpectedly|server ended with status"
)
"""What a process reports when another one has failed."""
_ENDED = re.compile(r"^([\w.]*\.)?(SystemExit|KeyboardInterrupt|CancelledError|\w+ResetError)\b")
"""What a process reports when it is stopped because another one has failed."""
_MEMORY = re.compile(
    r"out of memory|OutOfMemory|Cannot allocate memory|MemoryError|bad_alloc", re.IGNORECASE
)
_KILLED = re.compile(
    r"proc\(s\): \{.*: -9\b|proc \S+ died unexpectedly|server ended with status -9\b"
)
_LINE = re.compile(
    r"^(?:[\w.]*(?:Error|Exception|Exit)|Fatal [\w ]*error|Killed|terminate called|[\w ]+: error)\b"
)
"""An error without a traceback: from the interpreter, C++, or an argument parser."""
_PYDANTIC = re.compile(r"^(?P<type>\S*ValidationError): \d+ validation errors? for (?P<what>\S+)")
_DETAIL = re.compile(r"^ {2}(?:Value error, |Assertion failed, )?(.*?)(?: \[type=.*)?$")


@dataclass
class _Chain:
    """A traceback: exceptions that caused one another, the first one first; each as its lines."""

    process: str
    record: str
    line: int
    raised: list[list[str]] = field(default_factory=list)
    linked: bool = False
    in_frames: bool = True

    def read(self, line: str) -> None:
        if line == _TRACEBACK:
            self.linked, self.in_frames = False, True
        elif line in (_CAUSED, _DURING):
            self.linked = True
        elif self.in_frames:
            if _EXCEPTION.match(line):
                self.raised.append([line])
                self.in_frames = False
        elif line and not self.linked:
            self.raised[-1].append(line)

    @property
    def last(self) -> str:
        return _joined(self.raised[-1])

    @property
    def root(self) -> str:
        return _joined(self.raised[0])


def explain(text: str, status: int) -> str:
    """One line on why an engine ended.

    Args:
        text: the log of all its processes.
        status: the exit status of the outermost one, negative for a signal.
    """
    cause = _cause(text)
    if cause and _MEMORY.search(cause):
        return f"out of memory ({cause}); use a smaller MODEL or a larger TP"
    # A killed process logs nothing, so any error in its log was handled.
    if status == -signal.SIGKILL or (not cause and _KILLED.search(text)):
        return "the engine was killed (signal 9), most likely out of memory; use a smaller MODEL"
    if cause:
        return cause
    if status < 0:
        return f"the engine was ended by signal {-status} ({signal.Signals(-status).name})"
    vague = [chain.last for chain in _chains(text)]
    return vague[-1] if vague else f"the engine ended with status {status} and no error line"


def _cause(text: str) -> str | None:
    """The exception or line with the cause; None if all only report that another process failed."""
    chains = [chain for chain in _chains(text) if not _ENDED.match(chain.last)]
    outer = next((chain for chain in reversed(chains) if not chain.process), None)
    if outer and not _VAGUE.search(outer.last):
        return outer.root
    # The last error of each process ended it, earlier ones were handled; and the first process that
    # ended stopped the others.
    ends = {chain.process: chain for chain in chains if not _VAGUE.search(chain.last)}
    if ends:
        return min(ends.values(), key=lambda chain: chain.line).root
    lines = [line for _, _, line in _lines(text) if _LINE.match(line)]
    clear = [line for line in lines if not _VAGUE.search(line) and not _ENDED.match(line)]
    return _cut(clear[-1]) if clear else None


def _lines(text: str) -> Iterator[tuple[str, str, str]]:
    """(process, log record, line) of each line; the outermost process has no name."""
    for line in text.splitlines():
        line = _COLOUR.sub("", line)
        process = record = ""
        if match := _PROCESS.match(line):
            process, line = match[1], line[match.end() :]
        if match := _RECORD.match(line):
            record, line = match[1] + match[2], line[match.end() :]
        elif match := _RANK.match(line):
            record, line = match[0], line[match.end() :]
        yield process, record, line.rstrip()


def _chains(text: str) -> list[_Chain]:
    """All tracebacks in the order in which they begin."""
    chains: list[_Chain] = []
    current: dict[str, _Chain] = {}
    for number, (process, record, line) in enumerate(_lines(text)):
        chain = current.get(process)
        if chain and chain.record != record:
            chain = None
            del current[process]
        if line == _TRACEBACK and not (chain and chain.linked):
            chain = current[process] = _Chain(process, record, number)
            chains.append(chain)
        if chain:
            chain.read(line)
    return [chain for chain in chains if chain.raised]


def _joined(lines: list[str]) -> str:
    """An exception and its message in one line."""
    if match := _PYDANTIC.match(lines[0]):
        details = [detail[1] for line in lines[1:] if (detail := _DETAIL.match(line))]
        if details:
            return _cut(f"{match['type'].rpartition('.')[2]}: {match['what']}: {details[0]}")
    return _cut(" ".join(line.strip() for line in lines))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
