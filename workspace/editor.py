# SPDX-License-Identifier: Apache-2.0
"""What clangd needs to read CUDA C++ as nvcc does.

compile_commands.json holds nvcc's commands. .clangd replaces what clang does not know of them; a
new file gets the command of its neighbours. Both are written for the environment that runs this.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from custom_kernels import registry
from custom_kernels.compile import build, sources, toolchain
from custom_kernels.compile.toolchain import BuildError

from workspace.host.files import GENERATED, generated, write_file
from workspace.host.paths import CLANGD, COMPILE_COMMANDS, ROOT, STATE
from workspace.host.text import say

PRELUDE = STATE / "clangd.cuh"
"""Included before every file: what the headers of clang's CUDA lack."""

ARCHITECTURE = "sm_90a"
"""What `#if __CUDA_ARCH__` sees in the editor: the architecture for which most is written."""
NVCC_ONLY = ("-gencode*", "-ccbin*", "-lineinfo", "--expt-*", "-cudart*", "-Xptxas*")

PRELUDE_TEXT = """\
// Stores with a cache hint, which clang's headers do not declare. For clangd only.
template <typename T> __device__ void __stcg(T* to, T value);
template <typename T> __device__ void __stcs(T* to, T value);
template <typename T> __device__ void __stwb(T* to, T value);
"""


def write() -> None:
    """Write what changed; nothing without a tool chain, whose absence the compile reports.

    Raises:
        WorkspaceError: a file cannot be written.
    """
    try:
        commands, settings = _commands(), _settings()
    except BuildError:
        return
    _update(PRELUDE, PRELUDE_TEXT)
    _update(COMPILE_COMMANDS, json.dumps(commands, indent=1) + "\n")
    if CLANGD.exists() and not generated(CLANGD):
        say("keeping your .clangd; to have one generated for the kernels, remove it and re-run")
    else:
        _update(CLANGD, settings)


def _update(path: Path, text: str) -> None:
    """clangd reads a file again that was written again."""
    if not path.is_file() or path.read_text() != text:
        write_file(path, text.encode())


def _commands() -> list[dict[str, Any]]:
    """The entries of compile_commands.json: one per `.cu`."""
    pinned = sources.pinned_architectures()
    return [
        {
            "directory": str(ROOT),
            "file": str(backend.cuda),
            "arguments": [*build.nvcc_command(backend, backend.architectures(pinned)), "-c"],
        }
        for backend in registry.compiled()
    ]


def _settings() -> str:
    """The content of .clangd; JSON's lists and strings are YAML's, too."""
    return f"""{GENERATED} Settings of your own: ~/.config/clangd/config.yaml
If:
  PathMatch: .*\\.cuh?
  PathExclude: vllm-fork/.*
CompileFlags:
  Compiler: clang++
  Remove: {json.dumps(NVCC_ONLY)}
  Add: {json.dumps(_clang_flags(), indent=4)[:-1]}  ]
---
# It asks for the name that the file which includes it defines.
If:
  PathMatch: kernels/.*\\.cuh
CompileFlags:
  Add: {json.dumps(['-DKERNEL="header"'])}
"""


def _clang_flags() -> list[str]:
    tools = toolchain.find()
    folders = [folder / "cccl" for folder in tools.include if (folder / "cccl").is_dir()]
    for name in toolchain.HEADER_PACKAGES:  # for a kernel that is about to use them
        try:
            folders.append(toolchain.headers(name)[0])
        except BuildError:
            continue
    return [
        "-xcuda",
        f"--cuda-gpu-arch={ARCHITECTURE}",
        f"--cuda-path={tools.nvcc.parents[1]}",
        "-nocudalib",
        # clang knows no release after 12.8, and takes <<<>>> of an unknown one for that of CUDA 7.
        "--no-cuda-version-check",
        "-Xclang",
        "-target-sdk-version=12.8",
        # cooperative_groups has clusters for nvcc alone, though clang has the intrinsics.
        "-D_CG_CLUSTER_INTRINSICS_AVAILABLE",
        # nvcc's own C++ library: clang takes the newest GCC, which may lack one.
        *(f"--gcc-install-dir={folder}" for folder in _gcc(tools.cxx)),
        f"-include{PRELUDE}",
        *(f"-isystem{folder}" for folder in dict.fromkeys(folders)),
    ]


def _gcc(cxx: Path) -> list[Path]:
    """GCC's own folder; none if the host compiler is another."""
    command = [str(cxx), "-print-libgcc-file-name"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    library = Path(result.stdout.strip())
    return [library.parent] if library.name == "libgcc.a" and library.is_file() else []
