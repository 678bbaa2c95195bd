// SPDX-License-Identifier: Apache-2.0
//
// q, scale, sum = RMS norm of x + residual, quantized per token and expanded for a (2N-2):2N
// pattern.
//
//   x, residual [M, K] bfloat16, unit inner stride, any row stride, residual or none; weight [K]
//   bfloat16; q [M, K'] int8 or float8_e4m3fn; scale [M] float32; sum [M, K] bfloat16. Per row:
//   v = x + residual in float32, sum = bfloat16(v), r = 1 / sqrt(mean(v²) + epsilon),
//   y = bfloat16(bfloat16(v · r) · weight), and q and scale as quant_expand has them of y.
//   What is right is in reference.py, bit for bit: it fixes the order in which squares are added.
//
// The work is memory traffic: 2·K bytes of x and of the residual in, 2·K of sum and K' of q out. A
// team of warps has a row, a block has one or several teams. The row, the residual's and, once per
// block, the weight come into shared memory, from compute capability 9.0 on by TMA's bulk copies.
// y takes the place of x there, and is written as quant_expand writes it (quantize.cuh).
//
// Squares are added in the same order whatever the number of warps: a slot is 32 vectors of 8
// values, there are 16 slots of every 4096 values, each warp has whole slots, and every warp adds
// the 16 · 32 sums of lanes that all wrote.
//
// The launch overlaps the kernel before it and the one after it; the weight is fetched into L2
// meanwhile.

#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <cstdint>

#define KERNEL "rms_norm_quant.cuda"
#include "include/quantize.cuh"

namespace {

using namespace custom_kernels;
using tvm::ffi::Optional;
using tvm::ffi::String;
using tvm::ffi::TensorView;

constexpr int kWarps = 16;  // of a block
constexpr int kSlots = 16;
constexpr int kLanes = kSlots * 32;

struct Arguments {
  const uint16_t *x, *residual, *weight;
  char* q;
  float* scale;
  uint16_t* sum;
  int64_t rows, x_stride, residual_stride;  // in elements
  float epsilon;
  Layout layout;
  int warps;  // of a team
  // Every row of x and residual, and the weight, are aligned to 16 bytes; and K is, as well.
  bool aligned, wide;
  bool bulk;

  __host__ __device__ int vectors() const { return (layout.k + 7) / 8; }
  // Values of a row in shared memory: what emit reads, and whole vectors.
  __host__ __device__ int filled() const {
    int read = layout.chunks * layout.chunk_words * 2;
    return read > vectors() * 8 ? read : vectors() * 8;
  }
};

// The sum of 2 · Half values, of which half are added to the other half, and so on; left in the
// first.
template <int Half>
__device__ float sum_of(float* values) {
#pragma unroll
  for (int i = 0; i < Half; ++i) values[i] = __fadd_rn(values[i], values[i + Half]);
  if constexpr (Half > 1) return sum_of<Half / 2>(values);
  return values[0];
}

// ---- A vector: 8 values -------------------------------------------------------------------------

struct Vector {
  float values[8];

  __device__ explicit Vector(uint4 x) {
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = BFloat16::low(words[i]);
      values[2 * i + 1] = BFloat16::high(words[i]);
    }
  }
  __device__ void add(const Vector& other) {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = __fadd_rn(values[i], other.values[i]);
  }
  __device__ float sum_of_squares() const {
    float s[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i] = __fmul_rn(values[i], values[i]);
    return sum_of<4>(s);
  }
  // bfloat16(values · factor)
  __device__ uint4 rounded(float factor) const {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      __nv_bfloat162 pair = __floats2bfloat162_rn(__fmul_rn(values[2 * i], factor),
                                                  __fmul_rn(values[2 * i + 1], factor));
      words[i] = *reinterpret_cast<uint32_t*>(&pair);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

__device__ uint32_t times(uint32_t a, uint32_t b) {
  __nv_bfloat162 product = __hmul2(BFloat16::as(a), BFloat16::as(b));
  return *reinterpret_cast<uint32_t*>(&product);
}

__device__ uint4 times(uint4 a, uint4 b) {
  return make_uint4(times(a.x, b.x), times(a.y, b.y), times(a.z, b.z), times(a.w, b.w));
}

// x + residual of a vector.
template <bool Add>
__device__ Vector summed(const uint4* x, const uint4* residual, int vector) {
  Vector v(x[vector]);
  if constexpr (Add) v.add(Vector(residual[vector]));
  return v;
}

// ---- The kernel ---------------------------------------------------------------------------------

extern __shared__ __align__(128) unsigned char shared[];

template <typename Out, int N, bool Add>
__global__ void __launch_bounds__(kWarps * 32, 2) norm_rows(const __grid_constant__ Arguments a) {
  __shared__ uint32_t partial[kWarps];
  __shared__ __align__(8) uint64_t barriers[kWarps + 1];
  const Team team(a.warps);
  const int teams = blockDim.x / team.threads;
  const int64_t row = int64_t{blockIdx.x} * teams + team.index;
  const int64_t bytes = a.layout.row_bytes();
  const int k = a.layout.k, vectors = a.vectors(), filled = a.filled();
  // Shared memory: of every team x and the residual, the weight, of every team the sums of squares.
  uint32_t* x = reinterpret_cast<uint32_t*>(shared + team.index * (Add ? 2 : 1) * bytes);
  uint32_t* residual = x + bytes / 4;
  uint32_t* weight = reinterpret_cast<uint32_t*>(shared + teams * (Add ? 2 : 1) * bytes);
  float* sums = reinterpret_cast<float*>(weight + bytes / 4) + team.index * kLanes;
  const uint16_t* from = a.x + row * a.x_stride;
  const uint16_t* from_residual = a.residual + row * a.residual_stride;

#if __CUDA_ARCH__ >= 900
  const uint32_t of_weight = shared_address(barriers + kWarps);
  const uint32_t of_row = shared_address(barriers + team.index);
  if (a.bulk) {
    if (threadIdx.x == 0) {
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(a.weight), "r"(k * 2));
      init_barrier(of_weight);
    }
    if (team.thread == 0) init_barrier(of_row);
    __syncthreads();  // the barriers exist
    if (row < a.rows && team.thread == 0) {
      take_turn();
      expect_bytes(of_row, k * (Add ? 4 : 2));
      copy_bulk(x, from, k * 2, of_row);
      if constexpr (Add) copy_bulk(residual, from_residual, k * 2, of_row);
    }
    if (threadIdx.x == 0) {
      expect_bytes(of_weight, k * 2);
      copy_bulk(weight, a.weight, k * 2, of_weight);
    }
    if (row >= a.rows) return;
    for (int i = k / 2 + team.thread; i < filled / 2; i += team.threads) x[i] = 0;
    wait_for_bytes(of_row);
  } else
#endif
  {
    take_turn();
    const Team block(blockDim.x / 32);
    load<BFloat16>(a.weight, k, vectors * 8, a.aligned, block, weight);
    if (row < a.rows) {
      load<BFloat16>(from, k, filled, a.aligned, team, x);
      if constexpr (Add) load<BFloat16>(from_residual, k, vectors * 8, a.aligned, team, residual);
    }
    __syncthreads();
    if (row >= a.rows) return;
  }

  const uint4* x4 = reinterpret_cast<const uint4*>(x);
  const uint4* residual4 = reinterpret_cast<const uint4*>(residual);
  const int warp = team.thread / 32, lane = team.thread % 32;
  uint16_t* sum = a.sum + row * k;
#pragma unroll 1
  for (int slot = warp; slot < kSlots; slot += team.warps) {
    float squares = 0.f;
#pragma unroll 1
    for (int i = slot * 32 + lane; i < vectors; i += kLanes) {
      Vector v = summed<Add>(x4, residual4, i);
      squares = __fadd_rn(squares, v.sum_of_squares());
      if constexpr (Add) {
        uint4 rounded = v.rounded(1.f);
        if (a.wide) {
          reinterpret_cast<uint4*>(sum)[i] = rounded;
        } else {
          const uint16_t* values = reinterpret_cast<const uint16_t*>(&rounded);
#pragma unroll
          for (int j = 0; j < 8; ++j)
            if (i * 8 + j < k) sum[i * 8 + j] = values[j];
        }
      }
    }
    sums[slot * 32 + lane] = squares;
  }
  team.sync();
  float total[kSlots];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) total[slot] = sums[slot * 32 + lane];
  float squares = sum_of<kSlots / 2>(total);
#pragma unroll
  for (int other = 16; other > 0; other /= 2)
    squares = __fadd_rn(squares, __shfl_xor_sync(0xffffffffu, squares, other));
  const float mean = __fdiv_rn(squares, static_cast<float>(k));
  const float factor = __fdiv_rn(1.f, __fsqrt_rn(__fadd_rn(mean, a.epsilon)));

#if __CUDA_ARCH__ >= 900
  if (a.bulk) wait_for_bytes(of_weight);
#endif
  uint32_t found = 0;
#pragma unroll 1
  for (int slot = warp; slot < kSlots; slot += team.warps) {
#pragma unroll 1
    for (int i = slot * 32 + lane; i < vectors; i += kLanes) {
      uint4 y = times(summed<Add>(x4, residual4, i).rounded(factor),
                      reinterpret_cast<const uint4*>(weight)[i]);
      found = max_abs<BFloat16>(found, y);
      reinterpret_cast<uint4*>(x)[i] = y;  // no other thread reads this vector before the barrier
    }
  }
  const float amax = team.max_abs<BFloat16>(found, partial + team.index * team.warps);
  char* q = a.q + row * a.layout.end;
  emit<BFloat16, Out, N>(x, a.layout, 0, a.layout.chunks, team.thread, team.threads,
                         Factor(amax, Out::kMax), q);
  pad(a.layout, team.thread, team.threads, q);
  if (team.thread == 0) write_scale<Out>(a.scale + row, amax);
}

// ---- Launch -------------------------------------------------------------------------------------

struct Schedule {
  bool bulk;
  int warps;  // of a team
  int teams;  // of a block
};

int64_t shared_bytes(const Arguments& a, int teams) {
  const int64_t row = a.layout.row_bytes();
  return row + teams * ((a.residual ? 2 : 1) * row + kLanes * int64_t{sizeof(float)});
}

Schedule choose(const Arguments& a, const Device& device) {
  const int64_t room = device.shared_bytes - kStaticShared;
  if (shared_bytes(a, 1) > room)
    TVM_FFI_THROW(ValueError) << KERNEL ": a row of " << a.layout.k << " values takes "
                              << shared_bytes(a, 1) << " bytes of shared memory, of which a block "
                              << "may have " << room;
  Schedule s{a.wide && device.major >= 9, 1, 1};
  // Few rows: all hands to each, a slot for a warp. Many rows: small blocks, and room for three.
  const bool few = a.rows <= device.multiprocessors;
  const int values = few ? 256 : 1024;  // of a warp
  s.warps = std::clamp((a.layout.k + values - 1) / values, 1, kWarps);
  if (!few) {
    s.teams = std::max(1, 12 / s.warps);
    while (s.teams > 1 && (shared_bytes(a, s.teams) > room / 3 ||
                           a.rows < int64_t{2} * s.teams * device.multiprocessors))
      --s.teams;
  }
  return s;
}

template <typename Out>
void launch_formats(Arguments& a, const Schedule& s, int device, cudaStream_t stream) {
  a.warps = s.warps, a.bulk = s.bulk;
  with_pattern(a.layout.n, [&](auto n) {
    auto kernel = a.residual ? norm_rows<Out, n(), true> : norm_rows<Out, n(), false>;
    launch(kernel, device, stream, (a.rows + s.teams - 1) / s.teams, s.warps * s.teams * 32,
           shared_bytes(a, s.teams), a);
  });
}

void run(TensorView x, const Optional<TensorView>& residual, TensorView weight, double epsilon,
         const Optional<String>& pattern, TensorView q, TensorView scale, TensorView sum,
         const Schedule* forced) {
  int device = x.device().device_id;
  DeviceGuard on(device);
  auto stream = current_stream(device);
  const int64_t k = x.size(1);
  Arguments a{};
  a.x = static_cast<const uint16_t*>(x.data_ptr());
  a.weight = static_cast<const uint16_t*>(weight.data_ptr());
  a.q = static_cast<char*>(q.data_ptr());
  a.scale = static_cast<float*>(scale.data_ptr());
  a.rows = x.size(0);
  a.x_stride = a.rows > 1 ? x.stride(0) : k;  // of one row it means nothing
  a.epsilon = static_cast<float>(epsilon);
  a.layout = layout_of(k, pattern, q.size(1));
  auto aligned = [](const uint16_t* rows, int64_t stride) {
    return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride % 8 == 0;
  };
  a.aligned = aligned(a.x, a.x_stride) && aligned(a.weight, 0);
  if (residual.has_value()) {
    const TensorView& r = residual.value();
    a.residual = static_cast<const uint16_t*>(r.data_ptr());
    a.residual_stride = a.rows > 1 ? r.stride(0) : k;
    a.sum = static_cast<uint16_t*>(sum.data_ptr());
    a.aligned = a.aligned && aligned(a.residual, a.residual_stride) && aligned(a.sum, 0);
  }
  a.wide = a.aligned && k % 8 == 0;
  Schedule s = forced ? *forced : choose(a, Device::get(device));
  q.dtype().code == kDLInt ? launch_formats<Int8>(a, s, device, stream)
                           : launch_formats<Float8>(a, s, device, stream);
}

void rms_norm_quant(TensorView x, Optional<TensorView> residual, TensorView weight, double epsilon,
                    Optional<String> pattern, DLDataType, TensorView q, TensorView scale,
                    TensorView sum) {
  run(x, residual, weight, epsilon, pattern, q, scale, sum, nullptr);
}

// The same by a given schedule: for tests and measurements.
void rms_norm_quant_by(TensorView x, Optional<TensorView> residual, TensorView weight,
                       double epsilon, Optional<String> pattern, TensorView q, TensorView scale,
                       TensorView sum, bool bulk, int warps, int teams) {
  Schedule s{bulk, warps, teams};
  run(x, residual, weight, epsilon, pattern, q, scale, sum, &s);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm_quant, rms_norm_quant);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm_quant_by, rms_norm_quant_by);
