# SPDX-License-Identifier: Apache-2.0
"""Options for NVRTC, which compiles CuPy's kernels when they are first launched."""


def include_options() -> tuple[str, ...]:
    """Options that name all folders of CUDA's headers, for the ``options`` of a ``cupy.RawKernel``.

    CuPy itself names the CUDA runtime's folder. The packages of CUDA 12 have one per component, and
    ``mma.h`` needs two.
    """
    from custom_kernels.compile import toolchain

    return tuple(f"-I{folder}" for folder in toolchain.include_folders())
