// SPDX-License-Identifier: Apache-2.0
//
// q, scale = silu(gate) · up, quantized per token and expanded for a (2N-2):2N pattern.
//
//   x [M, 2K] bfloat16, unit inner stride, any row stride: gate is its first half, up its second;
//   q [M, K'] int8 or float8_e4m3fn; scale [M] float32. Per row:
//   y = bfloat16(bfloat16(gate / (1 + exp(-gate))) · up), and q and scale as quant_expand has them
//   of y. What is right is in reference.py, bit for bit.
//
// The work is memory traffic: 4·K bytes in, K' out. A team of warps has a row, a block has one or
// several teams. Each thread has vectors of 8 values of both halves, several in flight, and puts y
// into shared memory, from where it is written as quant_expand writes it (quantize.cuh).
//
// The launch overlaps the kernel before it and the one after it.

#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <cstdint>

#define KERNEL "silu_mul_quant.cuda"
#include "include/quantize.cuh"

namespace {

using namespace custom_kernels;
using tvm::ffi::Optional;
using tvm::ffi::String;
using tvm::ffi::TensorView;

constexpr int kWarps = 32;  // of a block

struct Arguments {
  const uint16_t* x;
  char* q;
  float* scale;
  int64_t rows, stride;  // of x, in elements
  Layout layout;
  int warps;  // of a team
  bool wide;  // both halves of every row are whole vectors, aligned to 16 bytes
};

// bfloat16 of this is bfloat16 of the exact quotient for every bfloat16 gate, as that of torch is:
// the quotients closest to the middle of two values are 2^-21 and more off it, but of some gates
// for which the error of exp, of at most one step, is lost in the sum.
__device__ float silu(float gate) {
  // The sum divided by 16, so that its inverse is no subnormal number.
  const float sum = __fmaf_rn(expf(-gate), 0x1p-4f, 0x1p-4f);
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(sum));
  inverse = __fmaf_rn(__fmaf_rn(-sum, inverse, 1.f), inverse, inverse);
  // Below, exp is infinite.
  return gate < -88.75f ? gate * 0.f : __fmul_rn(__fmul_rn(gate, 0x1p-4f), inverse);
}

// Of two values in a word.
__device__ uint32_t silu_mul(uint32_t gate, uint32_t up) {
  __nv_bfloat162 activated =
      __floats2bfloat162_rn(silu(BFloat16::low(gate)), silu(BFloat16::high(gate)));
  __nv_bfloat162 y = __hmul2(activated, BFloat16::as(up));
  return *reinterpret_cast<uint32_t*>(&y);
}

extern __shared__ __align__(128) unsigned char shared[];

template <typename Out, int N>
__global__ void __launch_bounds__(kWarps * 32) silu_rows(const __grid_constant__ Arguments a) {
  constexpr int kBatch = 4;  // vectors of each half in flight
  __shared__ uint32_t partial[kWarps];
  const Team team(a.warps);
  const int64_t row = int64_t{blockIdx.x} * (blockDim.x / team.threads) + team.index;
  if (row >= a.rows) return;
  const uint16_t *gate = a.x + row * a.stride, *up = gate + a.layout.k;
  uint32_t* words = reinterpret_cast<uint32_t*>(shared + team.index * a.layout.row_bytes());
  const int total = a.layout.chunks * a.layout.chunk_words * 2;
  const int vectors = a.wide ? a.layout.k / 8 : 0;
  take_turn();
  uint32_t found = 0;
  for (int start = team.thread; start < vectors; start += kBatch * team.threads) {
    uint4 gates[kBatch], ups[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      int vector = start + i * team.threads;
      if (vector < vectors) {
        gates[i] = __ldcs(reinterpret_cast<const uint4*>(gate) + vector);
        ups[i] = __ldcs(reinterpret_cast<const uint4*>(up) + vector);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      int vector = start + i * team.threads;
      if (vector < vectors) {
        uint4 y = make_uint4(silu_mul(gates[i].x, ups[i].x), silu_mul(gates[i].y, ups[i].y),
                             silu_mul(gates[i].z, ups[i].z), silu_mul(gates[i].w, ups[i].w));
        found = max_abs<BFloat16>(found, y);
        reinterpret_cast<uint4*>(words)[vector] = y;
      }
    }
  }
  for (int i = vectors * 8 + team.thread; i < total; i += team.threads) {
    uint16_t y = i < a.layout.k ? static_cast<uint16_t>(silu_mul(gate[i], up[i])) : uint16_t{0};
    found = BFloat16::max_abs(found, y);
    reinterpret_cast<uint16_t*>(words)[i] = y;
  }
  const float amax = team.max_abs<BFloat16>(found, partial + team.index * team.warps);
  char* q = a.q + row * a.layout.end;
  emit<BFloat16, Out, N>(words, a.layout, 0, a.layout.chunks, team.thread, team.threads,
                         Factor(amax, Out::kMax), q);
  pad(a.layout, team.thread, team.threads, q);
  if (team.thread == 0) write_scale<Out>(a.scale + row, amax);
}

// ---- Launch -------------------------------------------------------------------------------------

struct Schedule {
  int warps;  // of a team
  int teams;  // of a block
};

Schedule choose(const Arguments& a, const Device& device) {
  const int64_t row_bytes = a.layout.row_bytes(), room = device.shared_bytes - kStaticShared;
  if (row_bytes > room)
    TVM_FFI_THROW(ValueError) << KERNEL ": a row of " << a.layout.k << " values takes " << row_bytes
                              << " bytes of shared memory, of which a block may have " << room;
  Schedule s{1, 1};
  // Few rows: all hands to each. Many rows: small blocks, each thread with eight vectors.
  const bool few = a.rows <= device.multiprocessors;
  const int values = few ? 512 : 2048;  // of a warp
  s.warps = std::clamp((a.layout.k + values - 1) / values, 1, kWarps);
  if (!few) {
    s.teams = std::max(1, 12 / s.warps);
    while (s.teams > 1 && (s.teams * row_bytes > room / 3 ||
                           a.rows < int64_t{2} * s.teams * device.multiprocessors))
      --s.teams;
  }
  return s;
}

template <typename Out>
void launch_formats(Arguments& a, const Schedule& s, int device, cudaStream_t stream) {
  a.warps = s.warps;
  with_pattern(a.layout.n, [&](auto n) {
    launch(silu_rows<Out, n()>, device, stream, (a.rows + s.teams - 1) / s.teams,
           s.warps * s.teams * 32, s.teams * a.layout.row_bytes(), a);
  });
}

void run(TensorView x, const Optional<String>& pattern, TensorView q, TensorView scale,
         const Schedule* forced) {
  int device = x.device().device_id;
  DeviceGuard on(device);
  auto stream = current_stream(device);
  const int64_t k = x.size(1) / 2;
  Arguments a{};
  a.x = static_cast<const uint16_t*>(x.data_ptr());
  a.q = static_cast<char*>(q.data_ptr());
  a.scale = static_cast<float*>(scale.data_ptr());
  a.rows = x.size(0);
  a.stride = a.rows > 1 ? x.stride(0) : 2 * k;  // of one row it means nothing
  a.layout = layout_of(k, pattern, q.size(1));
  a.wide = reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && a.stride % 8 == 0 && k % 8 == 0;
  Schedule s = forced ? *forced : choose(a, Device::get(device));
  q.dtype().code == kDLInt ? launch_formats<Int8>(a, s, device, stream)
                           : launch_formats<Float8>(a, s, device, stream);
}

void silu_mul_quant(TensorView x, Optional<String> pattern, DLDataType, TensorView q,
                    TensorView scale) {
  run(x, pattern, q, scale, nullptr);
}

// The same by a given schedule: for tests and measurements.
void silu_mul_quant_by(TensorView x, Optional<String> pattern, TensorView q, TensorView scale,
                       int warps, int teams) {
  Schedule s{warps, teams};
  run(x, pattern, q, scale, &s);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_mul_quant, silu_mul_quant);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_mul_quant_by, silu_mul_quant_by);
