# SPDX-License-Identifier: Apache-2.0
"""What inspection reads out of compiled kernels, on small ones whose answer is known."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from custom_kernels import paths
from custom_kernels.compile import sources, toolchain
from custom_kernels.inspect import assembly, compilers
from custom_kernels.inspect.report import InspectionError
from custom_kernels.inspect.reports import fingerprint
from custom_kernels.operation import Operation, Specialization

from tests.kernels.conftest import PackageCopy

KERNELS = r"""
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <mma.h>

__global__ void __launch_bounds__(128) wide(const uint4* from, uint4* to) {
  __shared__ uint4 held[128];
  held[threadIdx.x] = from[threadIdx.x];
  __syncthreads();
  to[threadIdx.x] = held[127 - threadIdx.x];
}

__global__ void __launch_bounds__(1024, 2) spilling(const float* from, float* to, int n) {
  float values[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = from[i * n];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) to[i * n] = values[i] * values[(i * 7 + 3) % 64] + values[63 - i];
}

__global__ void multiplies(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  using namespace nvcuda;
  extern __shared__ __nv_bfloat16 tile[];
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> x;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::col_major> y;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
  for (int i = threadIdx.x; i < 256; i += 32) tile[i] = a[i];
  __syncwarp();
  wmma::fill_fragment(sum, 0.f);
  wmma::load_matrix_sync(x, tile, 16);
  wmma::load_matrix_sync(y, b, 16);
  wmma::mma_sync(sum, x, y, sum);
  wmma::store_matrix_sync(c, sum, 16, wmma::mem_row_major);
}

__global__ void sparse(const unsigned* a, float* d) {
  float c[4] = {};
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
      "{%4,%4,%4,%4}, {%5,%5,%5,%5}, {%0,%1,%2,%3}, %6, 0x0;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]));
  d[0] = c[0] + c[1] + c[2] + c[3];
}
"""
CUPY = """
import cupy

SOURCE = r'''
extern "C" __global__ void __launch_bounds__(64) scale(const float* x, float* y) {
  y[threadIdx.x] = FACTOR * x[threadIdx.x];
}
'''
KERNELS = {n: cupy.RawKernel(SOURCE, "scale", options=(f"-DFACTOR={n}",)) for n in (2, 3)}
AGAIN = [KERNELS[2]]
"""
HEADERS = """
import cupy
from custom_kernels.nvrtc import include_options

SOURCE = r'''
#include <cooperative_groups.h>
#include <cub/block/block_reduce.cuh>
#include <cuda/barrier>
#include <cuda/pipeline>
#include <cuda/std/array>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <mma.h>

namespace cg = cooperative_groups;

extern "C" __global__ void __launch_bounds__(64) sum(const float* x, float* y) {
  __shared__ float tile[64];
  __shared__ cuda::barrier<cuda::thread_scope_block> ready;
  auto block = cg::this_thread_block();
  if (block.thread_rank() == 0) init(&ready, block.size());
  block.sync();
  auto pipe = cuda::make_pipeline();
  pipe.producer_acquire();
  cuda::memcpy_async(&tile[threadIdx.x], &x[threadIdx.x], sizeof(float), pipe);
  pipe.producer_commit();
  pipe.consumer_wait();
  ready.arrive_and_wait();
  cuda::std::array<float, 2> two{tile[63 - threadIdx.x], float(__nv_fp8_e4m3(x[0]))};
  using Reduce = cub::BlockReduce<float, 64>;
  __shared__ Reduce::TempStorage scratch;
  float total = Reduce(scratch).Sum(two[0] + two[1]);
  if (threadIdx.x == 0) y[0] = total + float(__half(x[1])) + float(__nv_bfloat16(x[2]));
}
'''
KERNEL = cupy.RawKernel(SOURCE, "sum", options=include_options())
"""
TRITON = """
import triton
import triton.language as tl
from custom_kernels.operation import Specialization


@triton.jit
def copy(x, y, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < N), mask=i < N)


def specializations():
    types = {"x": "*fp16", "y": "*fp16", "N": "i32"}
    return [
        Specialization(copy, types, {"BLOCK": 1024}, label="any"),
        Specialization(copy, types, {"BLOCK": 1024}, label="aligned", aligned=("x", "y", "N")),
        Specialization(copy, types, {"BLOCK": 64}, label="new", architectures=("9.0a",)),
    ]
"""


@pytest.fixture
def toy(package_copy: PackageCopy) -> PackageCopy:
    for name in ("__init__", "reference"):
        package_copy.add(f"toy/{name}.py", "")
    return package_copy


def reports(copy: PackageCopy, *arguments: str) -> dict[str, dict[str, Any]]:
    """By kernel, or by kernel and architecture where there are several."""
    result = copy.python("-m", "custom_kernels.inspect", "--json", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads(result.stdout)
    return {
        "warnings": document["warnings"],
        **{f"{one['kernel']} {one['architecture']}": one for one in document["reports"]},
    }


@pytest.mark.nvcc
def test_cuda_kernels_are_read_right(toy: PackageCopy) -> None:
    toy.add("toy/fast.cu", KERNELS)
    found = reports(toy, "toy.fast", "--arch", "9.0a")
    wide = found["wide 9.0a"]
    assert (wide["load"], wide["store"]) == ("LDG 16 B", "STG 16 B")
    assert (wide["shared"], wide["dynamic"], wide["threads"]) == (2048, False, 128)
    assert (wide["spills"], wide["local"], wide["tensor"]) == (0, 0, {})
    assert wide["ptx"] > 5
    assert wide["sass"] % 16 == 0

    spilling = found["spilling 9.0a"]
    assert spilling["registers"] <= 32
    assert spilling["spills"] > 0
    assert spilling["local"] > 0
    assert spilling["occupancy"]["share"] == 1.0
    assert found["warnings"] == [
        f"toy.fast: spilling on 9.0a spills {spilling['spills']} bytes",
    ]

    multiplies = found["multiplies 9.0a"]
    assert multiplies["tensor"]["HMMA"] >= 1
    assert multiplies["dynamic"] is True
    assert multiplies["threads"] is None
    assert multiplies["occupancy"] is None
    assert set(found["sparse 9.0a"]["tensor"]) == {"HMMA.SP"}


@pytest.mark.nvcc
def test_what_a_file_says_to_be_on_purpose_is_no_warning(toy: PackageCopy) -> None:
    toy.add("toy/__init__.py", "USES_TENSOR_CORES = True\n")
    toy.add("toy/fast.cu", "// spills: it is about spilling\n" + KERNELS)
    plain = KERNELS[
        KERNELS.index("#include") : KERNELS.index("__global__ void __launch_bounds__(10")
    ]
    toy.add("toy/plain.cu", plain)
    found = reports(toy, "toy", "--arch", "8.0")
    assert found["warnings"] == [
        "toy.plain multiplies matrices without tensor-core instructions on 8.0"
    ]
    toy.add("toy/plain.cu", "// no tensor cores: it copies\n" + plain)
    assert reports(toy, "toy", "--arch", "8.0")["warnings"] == []


def test_cupy_kernels_are_found_once_each(toy: PackageCopy) -> None:
    toy.add("toy/fast.py", CUPY)
    found = reports(toy, "toy.fast")
    assert set(found) == {"warnings"} | {
        f"scale [{n}] {name}" for n in (2, 3) for name in sources.pinned_architectures()
    }
    assert found["scale [2] 9.0a"]["threads"] == 64
    assert found["scale [2] 9.0a"]["occupancy"] == {
        "blocks": 32, "share": 1.0, "limiter": "threads",
    }  # fmt: skip


def test_cupy_kernels_get_the_headers_and_options_of_a_launch(toy: PackageCopy) -> None:
    """CuPy brings CCCL's headers and names the C++ standard; no option here does."""
    toy.add("toy/fast.py", HEADERS)
    (report,) = list(reports(toy, "toy.fast", "--arch", "8.0").values())[1:]
    assert (report["kernel"], report["threads"]) == ("sum", 64)
    assert 256 < report["shared"] < 1024


@pytest.mark.nvcc
def test_a_cupy_kernel_is_compiled_by_the_compiler_that_it_names() -> None:
    cupy = pytest.importorskip("cupy")
    if " " in str(toolchain.find().nvcc.resolve()):
        pytest.skip("CuPy splits the path of nvcc at its spaces")
    code = CUPY.split("r'''")[1].split("'''", maxsplit=1)[0]
    code += "#ifdef __CUDACC_RTC__\n#error NVRTC\n#endif\n"
    options = ("-DFACTOR=2",)
    kernel = cupy.RawKernel(code, "scale", options, backend="nvcc")
    report = compilers.raw_kernel(kernel, "8.0")
    assert (report.threads, report.load) == (64, "LDG 4 B")
    with pytest.raises(InspectionError, match="NVRTC"):
        compilers.raw_kernel(cupy.RawKernel(code, "scale", options), "8.0")


def test_triton_is_compiled_as_a_launch_would(toy: PackageCopy) -> None:
    toy.add("toy/fast.py", TRITON)
    found = reports(toy, "toy.fast", "--arch", "8.0,9.0a")
    assert set(found) == {"warnings"} | {
        "copy (any) 8.0", "copy (any) 9.0a", "copy (aligned) 8.0", "copy (aligned) 9.0a",
        "copy (new) 9.0a",
    }  # fmt: skip
    assert found["copy (any) 9.0a"]["load"] == "LDG 2 B"
    assert found["copy (aligned) 9.0a"]["load"] == "LDG 16 B"
    assert found["copy (aligned) 9.0a"]["threads"] == 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TRITON.replace("tl.load(x + i", "tl.load(x + j"), "fast.py:10: at 3:32:"),
        (TRITON.replace("tl.arange(0, BLOCK)", "tl.arange(0, N)"), "fast.py:9: at 2:8:"),
        (TRITON.replace('"N": "i32"', '"M": "i32"'), "lacks N, and names M"),
        (TRITON.replace("def spec", "def _spec"), "has no specializations()"),
        (CUPY.replace("threadIdx.x]\n", "threadIdx.x\n").replace("= FACTOR", "= NO + FACTOR"),
         'fast.py(6): error: identifier "NO" is undefined'),
        (CUPY.replace('"scale", op', '"scele", op'), "has no kernel 'scele' but scale"),
        ("import triton\n\nnonsense = 1 +\n", "line 3"),
        ("import cupy\n\nraise ValueError('no')\n", "fast.py:3: ValueError: no"),
    ],
)  # fmt: skip
def test_an_error_is_the_compilers_own_with_the_line_of_the_file(
    toy: PackageCopy, text: str, message: str
) -> None:
    toy.add("toy/fast.py", text)
    result = toy.python("-m", "custom_kernels.inspect", "toy.fast", "--arch", "9.0a")
    assert result.returncode == 1
    assert message in result.stderr


def test_reports_are_kept_until_the_kernel_changes(toy: PackageCopy) -> None:
    helper = toy.add("toy/_helper.py", "FACTOR = 2\n")
    toy.add("toy/fast.py", CUPY + "\nfrom custom_kernels.toy import _helper\n")
    command = ("-X", "importtime", "-m", "custom_kernels.inspect", "toy.fast", "--arch", "8.0")
    first = toy.python(*command)
    kept = set((toy.cache / "inspections").iterdir())
    assert len(kept) == 1
    again = toy.python(*command)
    assert again.stdout == first.stdout
    assert "cupy" not in again.stderr  # nothing was imported, let alone compiled
    helper.write_text("FACTOR = 3\n")
    toy.python(*command)
    assert len(set((toy.cache / "inspections").iterdir()) - kept) == 1


def test_what_does_not_exist_is_one_line(toy: PackageCopy) -> None:
    for name, message in {
        "tay": "there is no operation 'tay'; there are: toy",
        "toy.fast": "toy has no backend 'fast'; there are: reference",
    }.items():
        result = toy.python("-m", "custom_kernels.inspect", name)
        assert (result.returncode, result.stderr) == (1, f"error: {message}\n")
    result = toy.python("-m", "custom_kernels.inspect", "toy", "--arch", "sm_90")
    assert "'sm_90' is not an architecture; use e.g. 9.0a" in result.stderr


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks", "share", "limiter"),
    [
        # Checked by hand against the rules of CUDA's occupancy calculator.
        ("9.0a", 256, 32, 0, 8, 1.0, "threads"),
        ("9.0a", 256, 33, 0, 6, 0.75, "registers"),  # 33 become 40 per thread
        ("8.0", 1024, 64, 0, 1, 0.5, "registers"),
        ("12.0a", 256, 32, 0, 6, 1.0, "threads"),
        ("9.0a", 128, 32, 100 * 1024, 2, 8 / 64, "shared memory"),
        ("8.0", 128, 32, 81 * 1024, 2, 8 / 64, "shared memory"),
        ("12.0a", 128, 32, 64 * 1024, 1, 4 / 48, "shared memory"),
        ("9.0a", 32, 16, 0, 32, 0.5, "blocks"),
        ("10.0a", 384, 168, 0, 1, 12 / 64, "registers"),
    ],
)
def test_occupancy(
    architecture: str,
    threads: int,
    registers: int,
    shared: int,
    blocks: int,
    share: float,
    limiter: str,
) -> None:
    found = assembly.occupancy(architecture, threads, registers, shared)
    assert found is not None
    assert (found.blocks, found.share, found.limiter) == (blocks, share, limiter)


def test_occupancy_of_an_unknown_architecture_is_not_guessed() -> None:
    assert assembly.occupancy("99.0", 128, 32, 0) is None


@pytest.mark.nvcc
def test_hopper_instructions_are_recognised(tmp_path: Path) -> None:
    """TMA's bulk copies, and the reserved kilobyte of shared memory that is not the kernel's."""
    source = tmp_path / "bulk.cu"
    source.write_text(r"""
        extern "C" __global__ void bulk(const char* from, char* to) {
          __shared__ alignas(128) char held[1024];
          __shared__ unsigned long long barrier;
          unsigned at = __cvta_generic_to_shared(held), bar = __cvta_generic_to_shared(&barrier);
          asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(bar));
          asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                       "[%0], [%1], 1024, [%2];" :: "r"(at), "l"(from), "r"(bar) : "memory");
          asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 1024;"
                       :: "l"(to), "r"(at) : "memory");
        }""")
    cubin = tmp_path / "bulk.cubin"
    subprocess.run(
        [toolchain.find().nvcc, "-cubin", "-arch=sm_90a", source, "-o", cubin], check=True
    )
    (code,) = assembly.read(cubin)
    assert (code.load, code.store) == ("bulk", "bulk")
    assert 1032 <= code.shared < 2048


def test_variants_for_a_verdict_cover_all_kernels() -> None:
    backend = Operation("toy").backend("fast")
    jobs = [
        compilers._Job(backend, "9.0a", Specialization(kernel, {}, label=str(n)))
        for kernel in ("a", "b")
        for n in range(10)
    ]
    some = compilers._some(jobs, 4)
    assert [(job.item.kernel, job.item.label) for job in some] == [
        ("a", "0"), ("a", "9"), ("b", "0"), ("b", "9"),
    ]  # fmt: skip


def test_a_fingerprint_covers_what_a_backend_imports_and_no_tool(
    toy: PackageCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.add("toy/fast.py", TRITON)
    monkeypatch.setattr(paths, "PACKAGE", toy.package)
    backend = Operation("toy").backend("fast")
    before = fingerprint(backend)
    for tool in ("inspect/table.py", "inspect/compilers.py", "compile/toolchain.py"):
        toy.add(tool, "")
    assert fingerprint(backend) == before
    toy.add("operation.py", "")
    assert fingerprint(backend) != before
