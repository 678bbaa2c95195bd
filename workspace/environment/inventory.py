# SPDX-License-Identifier: Apache-2.0
"""`make inventory`: what a machine has, for packing a bundle that fits it.

    python3 inventory.py > inventory.json

It describes the Python that runs it and the machine. A single file that needs only the standard
library, so that it can be copied to a machine without a checkout; it also runs on Python versions
that the workspace does not support.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import mmap
import os
import platform
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
from importlib import metadata
from typing import Any

FORMAT = 1
"""Changes when a bundle can no longer be packed from an older inventory."""


def _output(*command: str) -> str | None:
    """The output of a command, None if it is missing or fails."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def python() -> dict[str, Any]:
    version = sys.version_info
    found = importlib.util.find_spec
    return {
        "executable": sys.executable,
        "version": platform.python_version(),
        "short": f"{version[0]}.{version[1]}",
        "implementation": sys.implementation.name,
        "abi": sysconfig.get_config_var("SOABI"),
        "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        "platform": sysconfig.get_platform(),
        "headers": headers() is not None,
        # Missing if Python was built without a library. Without these modules nothing can be set
        # up; without lzma a bundle is larger.
        "missing_modules": [
            name for name in ("venv", "zlib", "_ssl", "_ctypes") if not found(name)
        ],
        "lzma": found("_lzma") is not None,
    }


def markers() -> dict[str, Any]:
    """Values of the environment markers of requirements (PEP 508)."""
    version = sys.implementation.version
    return {
        "implementation_name": sys.implementation.name,
        "implementation_version": ".".join(str(number) for number in version[:3]),
        "os_name": os.name,
        "platform_machine": platform.machine(),
        "platform_python_implementation": platform.python_implementation(),
        "platform_release": platform.release(),
        "platform_system": platform.system(),
        "platform_version": platform.version(),
        "python_full_version": platform.python_version(),
        "python_version": ".".join(platform.python_version_tuple()[:2]),
        "sys_platform": sys.platform,
    }


def packages() -> dict[str, Any]:
    """Name → version, requirements and whether it links with torch, of every distribution; of
    duplicates, the first counts."""
    entries: dict[str, Any] = {}
    for distribution in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name and distribution.version and name not in entries:
            entries[name] = {
                "version": distribution.version,
                "requires": distribution.requires or [],
                "links_torch": any(map(links_torch, compiled_files(distribution))),
            }
    return dict(sorted(entries.items()))


def installed_files(distribution: metadata.Distribution) -> list[str]:
    """The files of a distribution, relative to its folder; none if it has no list of them."""
    lines = (distribution.read_text("RECORD") or "").splitlines()
    return [line.rsplit(",", 2)[0].strip('"') for line in lines]


def compiled_files(distribution: metadata.Distribution) -> list[str]:
    names = [name for name in installed_files(distribution) if ".so" in os.path.basename(name)]
    return [str(distribution.locate_file(name)) for name in names]


def links_torch(path: str) -> bool:
    """Whether a shared library is linked with torch's, so that only that version can load it."""
    return any(name.startswith(("libtorch", "libc10")) for name in linked_libraries(path))


def linked_libraries(path: str) -> list[str]:
    """The libraries that a shared library names as needed (ELF, 64 bits, little-endian)."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            if data[:6] != b"\x7fELF\x02\x01":
                return []
            (start,) = struct.unpack_from("<Q", data, 32)
            size, count = struct.unpack_from("<HH", data, 54)
            # type, flags, offset in the file, address, physical address, size in the file
            parts = [struct.unpack_from("<IIQQQQ", data, start + i * size) for i in range(count)]
            entries = [
                struct.unpack_from("<qQ", data, part[2] + place)
                for part in parts
                if part[0] == 2  # PT_DYNAMIC
                for place in range(0, part[5], 16)
            ]
            address = next((value for tag, value in entries if tag == 5), 0)  # DT_STRTAB
            loaded = (part for part in parts if part[0] == 1 and 0 <= address - part[3] < part[5])
            strings = next((part[2] + address - part[3] for part in loaded), 0)
            names = [strings + value for tag, value in entries if tag == 1]  # DT_NEEDED
            return [data[name : data.find(b"\0", name)].decode() for name in names]
    except (OSError, ValueError, OverflowError, struct.error):  # missing, empty, or cut off
        return []


def torch() -> dict[str, Any] | None:
    """torch and its CUDA version; in a child process, because importing torch may crash."""
    query = (
        "import json, torch; print(json.dumps({'version': torch.__version__, "
        "'cuda': torch.version.cuda, 'cxx11_abi': torch.compiled_with_cxx11_abi(), "
        "'sees_gpu': torch.cuda.is_available()}))"
    )
    text = _output(sys.executable, "-c", query)
    return json.loads(text.splitlines()[-1]) if text else None


def gpus() -> list[dict[str, Any]]:
    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    text = _output("nvidia-smi", query, "--format=csv,noheader,nounits")
    rows = [[value.strip() for value in line.split(",")] for line in (text or "").splitlines()]
    names = ("name", "driver", "memory_mib", "capability")
    return [dict(zip(names, row)) for row in rows if len(row) == 4]  # noqa: B905 - Python 3.10


def headers() -> str | None:
    """The folder in which a C++ compiler would find Python.h."""
    folders = [sysconfig.get_path("include"), *os.environ.get("CPATH", "").split(os.pathsep)]
    with_header = (path for path in folders if path and os.path.exists(path + "/Python.h"))
    return next(with_header, None)


def libnuma() -> bool:
    """Whether the library exists that vLLM's CPU binaries load."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return False
    return True


def nvcc() -> dict[str, Any] | None:
    """The CUDA compiler that `make kernels` would use."""
    for variable in ("CUDA_HOME", "CUDA_PATH", None):
        folder = os.environ.get(variable) if variable else ""
        path = os.path.join(folder, "bin", "nvcc") if folder else shutil.which("nvcc")
        text = _output(path, "--version") if path and (variable is None or folder) else None
        version = re.search(r"V(\d+\.\d+\.\d+)", text or "")
        if version:
            return {"path": os.path.realpath(str(path)), "version": version[1]}
    return None


def tools() -> dict[str, Any]:
    """First line of each tool's version, None where it is missing."""
    names = ("git", "make", "g++", "ninja", "uv")
    texts = {name: _output(name, "--version") for name in names}
    return {name: text.splitlines()[0] if text else None for name, text in texts.items()}


def collect() -> dict[str, Any]:
    libc, libc_version = platform.libc_ver()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "format": FORMAT,
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "libc": {"name": libc, "version": libc_version},
        "libnuma": libnuma(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "free_gib": {
            place: round(shutil.disk_usage(place).free / 2**30, 1)
            for place in (os.getcwd(), os.path.expanduser("~"), "/tmp")
            if os.path.isdir(place)
        },
        "python": python(),
        "markers": markers(),
        "gpus": gpus(),
        "torch": torch(),
        "nvcc": nvcc(),
        "tools": tools(),
        "packages": packages(),
    }


def write(path: str, text: str) -> None:
    """Write a file beside its place and rename it: the old one or the new one, never half of it."""
    partial = os.path.join(os.path.dirname(path), ".partial-" + os.path.basename(path))
    try:
        with open(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if os.path.exists(partial):
            os.remove(partial)
        sys.exit(
            f"error: cannot write {path}: {error.strerror}; free some space or make it writable, "
            "then re-run"
        )


def main(arguments: list[str]) -> None:
    """Write the inventory to the given file, else to standard output."""
    text = json.dumps(collect(), indent=1) + "\n"
    if not arguments:
        sys.stdout.write(text)
        return
    write(arguments[0], text)
    name = shlex.quote(os.path.basename(arguments[0]).replace("$", "$$"))  # a $ is make's, too
    sys.stderr.write(
        f"wrote {os.path.abspath(arguments[0])} for {sys.executable}; copy it to a machine with a "
        f"network and run there: make bundle TARGET={name}\n"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `| head`
    main(sys.argv[1:])
