# SPDX-License-Identifier: Apache-2.0
"""y = silu(x) * scale as a CuPy RawKernel: a block per row.

x [M, K], scale [K], y [M, K], all bfloat16 or all float16; computed in float32.
"""

import cupy
import torch

from custom_kernels import nvrtc

DTYPES = (torch.bfloat16, torch.float16)
THREADS = 256

SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" __global__ void __launch_bounds__(THREADS)
scaled_silu(const T* x, const T* scale, T* y, long long k) {
  long long row = blockIdx.x * k;  // 64 bits: M times K may be large
  for (long long i = threadIdx.x; i < k; i += THREADS) {
    float value = float(x[row + i]);
    y[row + i] = T(value / (1.f + __expf(-value)) * float(scale[i]));
  }
}
"""

KERNELS = {
    dtype: cupy.RawKernel(
        SOURCE,
        "scaled_silu",
        options=(f"-DT={name}", f"-DTHREADS={THREADS}", "-std=c++17", *nvrtc.include_options()),
    )
    for dtype, name in ((torch.bfloat16, "__nv_bfloat16"), (torch.float16, "__half"))
}


def run(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Asynchronous on the current stream; the first call per dtype compiles."""
    m, k = x.shape
    y = torch.empty_like(x)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    with cupy.cuda.Device(x.device.index), cupy.cuda.ExternalStream(stream):
        pointers = (x.data_ptr(), scale.data_ptr(), y.data_ptr())
        KERNELS[x.dtype]((m,), (THREADS,), (*pointers, k))
    return y
